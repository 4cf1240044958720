//! Label selectors, and the labels that they select by.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use std::collections::BTreeMap;

/// What has labels.
pub trait Labelled {
    fn label(&self, key: &str) -> Option<&str>;
}

impl Labelled for Option<BTreeMap<String, String>> {
    fn label(&self, key: &str) -> Option<&str> {
        self.as_ref()?.get(key).map(String::as_str)
    }
}

/// The labels of something of which there are many: in one piece, since a map of a few takes ten times as much.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels(Box<str>);

impl Labels {
    /// Neither a key nor a value has a `=` or a line's end in it.
    pub fn of(labels: Option<&BTreeMap<String, String>>) -> Self {
        let text: String = labels.into_iter().flatten().map(|(key, value)| format!("{key}={value}\n")).collect();
        Self(text.into())
    }

    #[cfg(test)]
    pub fn size(&self) -> usize {
        self.0.len()
    }
}

impl Labelled for Labels {
    fn label(&self, key: &str) -> Option<&str> {
        self.0.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selector(Vec<Requirement>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    DoesNotExist(String),
    /// One that this agent does not know: whoever wrote it wanted less than everything.
    Unknown,
}

impl Selector {
    /// An empty one selects everything.
    pub fn of(selector: &LabelSelector) -> Self {
        let labels = selector.match_labels.iter().flatten();
        let labels = labels.map(|(key, value)| Requirement::In(key.clone(), vec![value.clone()]));
        let expressions = selector.match_expressions.iter().flatten().map(|expression| {
            let (key, values) = (expression.key.clone(), expression.values.clone().unwrap_or_default());
            match expression.operator.as_str() {
                "In" => Requirement::In(key, values),
                "NotIn" => Requirement::NotIn(key, values),
                "Exists" => Requirement::Exists(key),
                "DoesNotExist" => Requirement::DoesNotExist(key),
                _ => Requirement::Unknown,
            }
        });
        Self(labels.chain(expressions).collect())
    }

    pub fn selects(&self, labelled: &dyn Labelled) -> bool {
        let is_among = |key: &str, values: &[String]| {
            labelled.label(key).is_some_and(|found| values.iter().any(|value| value == found))
        };
        self.0.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => is_among(key, values),
            Requirement::NotIn(key, values) => !is_among(key, values),
            Requirement::Exists(key) => labelled.label(key).is_some(),
            Requirement::DoesNotExist(key) => labelled.label(key).is_none(),
            Requirement::Unknown => false,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn a_selector_selects_what_meets_all_of_it_however_labels_are_kept() {
        let labels: BTreeMap<String, String> =
            [("app", "web"), ("app.kubernetes.io/name", "x"), ("empty", "")].map(|(k, v)| (k.into(), v.into())).into();
        let (kept, packed) = (Some(labels.clone()), Labels::of(Some(&labels)));
        let one = |operator: &str, key: &str, values: &[&str]| json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
        let cases: Vec<(Value, bool)> = vec![
            (json!({}), true),
            (json!({"matchLabels": {"app": "web"}}), true),
            (json!({"matchLabels": {"app": "we"}}), false),
            (json!({"matchLabels": {"app": "web", "tier": "a"}}), false),
            (json!({"matchLabels": {"empty": ""}}), true),
            (json!({"matchLabels": {"ap": "p=web"}}), false),
            (one("In", "app", &["a", "web"]), true),
            (one("In", "tier", &["a"]), false),
            (one("NotIn", "app", &["web"]), false),
            (one("NotIn", "tier", &["a"]), true),
            (one("Exists", "empty", &[]), true),
            (one("Exists", "app.kubernetes.io", &[]), false),
            (one("DoesNotExist", "app", &[]), false),
            (one("DoesNotExist", "tier", &[]), true),
            (one("Near", "app", &[]), false),
            (
                json!({"matchLabels": {"app": "web"}, "matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}),
                false,
            ),
        ];
        for (selector, wanted) in cases {
            let parsed = Selector::of(&serde_json::from_value(selector.clone()).unwrap());
            assert_eq!(parsed.selects(&kept), wanted, "{selector}");
            assert_eq!(parsed.selects(&packed), wanted, "{selector}");
        }
        assert!(Selector::of(&LabelSelector::default()).selects(&None::<BTreeMap<String, String>>));
        assert_eq!(Labels::of(None).label(""), None);
    }
}
