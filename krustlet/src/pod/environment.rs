//! A container's environment and arguments: literals, ConfigMaps, Secrets, fields of the pod, `$(VAR)` references.
//!
//! The rules are the kubelet's. Reading from the API server ([`Sources`]) stands apart from putting together.

use futures::future::try_join_all;
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, EnvVarSource, ObjectFieldSelector, Pod, ResourceFieldSelector, ResourceRequirements, Secret,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::{Api, GetParams};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::time::Duration;

/// What a container's process is started with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContainerEnvironment {
    pub env: Vec<(String, String)>,
    /// `command`, then `args`, with their `$(VAR)` references expanded.
    pub args: Vec<String>,
}

/// Why a pod's configuration cannot be given to it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Something that may still appear: the container waits and tries again.
    #[error("{0}")]
    Missing(String),
    /// Something that stays wrong until the pod is changed.
    #[error("{0}")]
    Invalid(String),
}

/// What a pod may learn about where it runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodFacts {
    pub node_name: String,
    pub host_ip: String,
    pub pod_ip: String,
    /// Thousandths of a core.
    pub allocatable_cpu_millis: u64,
    /// Bytes.
    pub allocatable_memory: u64,
}

/// Reads what the container refers to, then puts its environment together.
pub async fn resolve(
    client: &kube::Client,
    pod: &Pod,
    container: &Container,
    facts: &PodFacts,
) -> Result<ContainerEnvironment, ConfigError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let wanted = Wanted::by_environment(container);
    let sources = Sources::read(client, namespace, &wanted, &GetParams::default()).await?;
    assemble(pod, container, facts, &sources)
}

/// Names of the ConfigMaps and Secrets that something refers to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    pub config_maps: BTreeSet<String>,
    pub secrets: BTreeSet<String>,
}

impl Wanted {
    fn by_environment(container: &Container) -> Self {
        let mut wanted = Self::default();
        for source in container.env_from.iter().flatten() {
            wanted.config_maps.extend(source.config_map_ref.iter().map(|r| r.name.clone()));
            wanted.secrets.extend(source.secret_ref.iter().map(|r| r.name.clone()));
        }
        for source in container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref()) {
            wanted.config_maps.extend(source.config_map_key_ref.iter().map(|r| r.name.clone()));
            wanted.secrets.extend(source.secret_key_ref.iter().map(|r| r.name.clone()));
        }
        wanted
    }
}

/// The ConfigMaps and Secrets of one namespace that were asked for; those that do not exist are absent.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    pub namespace: String,
    pub config_maps: BTreeMap<String, ConfigMap>,
    pub secrets: BTreeMap<String, Secret>,
}

impl Sources {
    /// Reads all that is wanted at once. Fails with [`ConfigError::Missing`] when the API server does not answer.
    pub async fn read(
        client: &kube::Client,
        namespace: &str,
        wanted: &Wanted,
        version: &GetParams,
    ) -> Result<Self, ConfigError> {
        let (config_maps, secrets) = futures::try_join!(
            read_all::<ConfigMap>(client, namespace, "ConfigMap", &wanted.config_maps, version),
            read_all::<Secret>(client, namespace, "Secret", &wanted.secrets, version),
        )?;
        Ok(Self { namespace: namespace.to_owned(), config_maps, secrets })
    }

    pub fn config_map(&self, name: &str, optional: bool) -> Result<Option<&ConfigMap>, ConfigError> {
        self.found("ConfigMap", name, self.config_maps.get(name), optional)
    }

    pub fn secret(&self, name: &str, optional: bool) -> Result<Option<&Secret>, ConfigError> {
        self.found("Secret", name, self.secrets.get(name), optional)
    }

    fn found<'a, K>(
        &self,
        kind: &str,
        name: &str,
        object: Option<&'a K>,
        optional: bool,
    ) -> Result<Option<&'a K>, ConfigError> {
        match object {
            None if !optional => Err(ConfigError::Missing(format!(
                "{kind} {}/{name} does not exist; create it, or mark the reference optional",
                self.namespace
            ))),
            object => Ok(object),
        }
    }
}

async fn read_all<K>(
    client: &kube::Client,
    namespace: &str,
    kind: &str,
    names: &BTreeSet<String>,
    version: &GetParams,
) -> Result<BTreeMap<String, K>, ConfigError>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + Debug
        + serde::de::DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    let reads = names.iter().map(|name| {
        let api = &api;
        async move {
            match while_forbidden(|| api.get_with(name, version)).await {
                Ok(object) => Ok(Some((name.clone(), object))),
                Err(kube::Error::Api(status)) if status.is_not_found() => Ok(None),
                Err(error) => Err(ConfigError::Missing(format!("failed to read {kind} {namespace}/{name}: {error}"))),
            }
        }
    });
    Ok(try_join_all(reads).await?.into_iter().flatten().collect())
}

/// Repeats a call for a moment while it is forbidden.
///
/// The node authorizer learns of a new pod from a watch of its own, often a little later than the node does; until
/// then it denies the node what the pod refers to.
pub async fn while_forbidden<T, F>(call: impl Fn() -> F) -> kube::Result<T>
where
    F: Future<Output = kube::Result<T>>,
{
    let mut pause = Duration::from_millis(10);
    loop {
        match call().await {
            Err(kube::Error::Api(status)) if status.is_forbidden() && pause < Duration::from_millis(500) => {
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            result => return result,
        }
    }
}

/// The pure part of [`resolve`].
pub fn assemble(
    pod: &Pod,
    container: &Container,
    facts: &PodFacts,
    sources: &Sources,
) -> Result<ContainerEnvironment, ConfigError> {
    let mut variables = Variables::default();
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        if let Some(reference) = &source.config_map_ref
            && let Some(object) = sources.config_map(&reference.name, reference.optional == Some(true))?
        {
            for (key, value) in object.data.iter().flatten() {
                variables.set(format!("{prefix}{key}"), value.clone())?;
            }
        }
        if let Some(reference) = &source.secret_ref
            && let Some(object) = sources.secret(&reference.name, reference.optional == Some(true))?
        {
            for (key, value) in object.data.iter().flatten() {
                let value = utf8(&value.0, "Secret", &reference.name, key)?;
                variables.set(format!("{prefix}{key}"), value)?;
            }
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match (&variable.value, &variable.value_from) {
            (Some(literal), _) if !literal.is_empty() => Some(variables.expand(literal)),
            (_, Some(source)) => from_source(source, pod, container, facts, sources)?,
            _ => Some(String::new()),
        };
        if let Some(value) = value {
            variables.set(variable.name.clone(), value)?;
        }
    }
    let words = container.command.iter().flatten().chain(container.args.iter().flatten());
    let args = words.map(|word| variables.expand(word)).collect();
    Ok(ContainerEnvironment { env: variables.0, args })
}

/// A variable's value, or None when it is optional and there is none.
fn from_source(
    source: &EnvVarSource,
    pod: &Pod,
    container: &Container,
    facts: &PodFacts,
    sources: &Sources,
) -> Result<Option<String>, ConfigError> {
    if let Some(field) = &source.field_ref {
        return field_value(field, pod, facts).map(Some);
    }
    if let Some(resource) = &source.resource_field_ref {
        return resource_value(resource, pod, Some(container), facts).map(Some);
    }
    if let Some(key) = &source.config_map_key_ref {
        let optional = key.optional == Some(true);
        let Some(object) = sources.config_map(&key.name, optional)? else { return Ok(None) };
        return match object.data.as_ref().and_then(|data| data.get(&key.key)) {
            None if !optional => Err(missing_key("ConfigMap", sources, &key.name, &key.key)),
            value => Ok(value.cloned()),
        };
    }
    if let Some(key) = &source.secret_key_ref {
        let optional = key.optional == Some(true);
        let Some(object) = sources.secret(&key.name, optional)? else { return Ok(None) };
        return match object.data.as_ref().and_then(|data| data.get(&key.key)) {
            None if !optional => Err(missing_key("Secret", sources, &key.name, &key.key)),
            None => Ok(None),
            Some(value) => utf8(&value.0, "Secret", &key.name, &key.key).map(Some),
        };
    }
    if source.file_key_ref.is_some() {
        return Err(ConfigError::Invalid("fileKeyRef is not supported; use a ConfigMap or a Secret".into()));
    }
    Err(ConfigError::Invalid("a variable's valueFrom names no source".into()))
}

pub fn missing_key(kind: &str, sources: &Sources, name: &str, key: &str) -> ConfigError {
    ConfigError::Missing(format!("{kind} {}/{name} has no key {key:?}", sources.namespace))
}

fn utf8(bytes: &[u8], kind: &str, name: &str, key: &str) -> Result<String, ConfigError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| {
        ConfigError::Invalid(format!(
            "{kind} {name}, key {key:?}: a variable must be UTF-8; mount it as a file instead"
        ))
    })
}

/// Variables in the order of their first mention; a later value takes the earlier one's place.
#[derive(Debug, Default)]
struct Variables(Vec<(String, String)>);

impl Variables {
    fn set(&mut self, name: String, value: String) -> Result<(), ConfigError> {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(ConfigError::Invalid(format!("environment variable {name:?} cannot be passed to a process")));
        }
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some(known) => known.1 = value,
            None => self.0.push((name, value)),
        }
        Ok(())
    }

    /// Replaces `$(NAME)` by what is known so far, `$$` by `$`, and leaves everything else as it is.
    fn expand(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(at) = rest.find('$') {
            out.push_str(&rest[..at]);
            let after = &rest[at + 1..];
            let reference = after.strip_prefix('(').and_then(|inner| inner.split_once(')'));
            rest = if let Some(literal) = after.strip_prefix('$') {
                out.push('$');
                literal
            } else if let Some((name, tail)) = reference {
                match self.0.iter().find(|(known, _)| known == name) {
                    Some((_, value)) => out.push_str(value),
                    None => out.push_str(&rest[at..rest.len() - tail.len()]),
                }
                tail
            } else {
                out.push('$');
                after
            };
        }
        out.push_str(rest);
        out
    }
}

/// The value of a field of the pod, as a variable or a downwardAPI file shows it.
pub fn field_value(field: &ObjectFieldSelector, pod: &Pod, facts: &PodFacts) -> Result<String, ConfigError> {
    let path = field.field_path.as_str();
    let unsupported = || ConfigError::Invalid(format!("fieldRef {path:?} is not supported"));
    if !matches!(field.api_version.as_deref(), None | Some("" | "v1")) {
        return Err(unsupported());
    }
    let metadata = &pod.metadata;
    let spec = pod.spec.as_ref();
    if let Some((map, key)) = path.strip_suffix("']").and_then(|start| start.split_once("['")) {
        let map = match map {
            "metadata.labels" => &metadata.labels,
            "metadata.annotations" => &metadata.annotations,
            _ => return Err(unsupported()),
        };
        return Ok(map.as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default());
    }
    match path {
        "metadata.name" => Ok(metadata.name.clone().unwrap_or_default()),
        "metadata.namespace" => Ok(metadata.namespace.clone().unwrap_or_default()),
        "metadata.uid" => Ok(metadata.uid.clone().unwrap_or_default()),
        "metadata.labels" => Ok(format_map(metadata.labels.as_ref())),
        "metadata.annotations" => Ok(format_map(metadata.annotations.as_ref())),
        "spec.nodeName" => Ok(facts.node_name.clone()),
        "spec.serviceAccountName" => Ok(spec.and_then(|s| s.service_account_name.clone()).unwrap_or_default()),
        "status.hostIP" | "status.hostIPs" => Ok(facts.host_ip.clone()),
        "status.podIP" | "status.podIPs" => Ok(facts.pod_ip.clone()),
        _ => Err(unsupported()),
    }
}

/// `key="value"` lines in the order of the keys, the values quoted as Go quotes them.
fn format_map(map: Option<&BTreeMap<String, String>>) -> String {
    let lines: Vec<String> =
        map.into_iter().flatten().map(|(key, value)| format!("{key}={}", go_quote(value))).collect();
    lines.join("\n")
}

fn go_quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{b}' => out.push_str("\\v"),
            '\u{c}' => out.push_str("\\f"),
            c if c.is_ascii_control() => out.push_str(&format!("\\x{:02x}", c as u32)),
            c if c.is_control() || (c.is_whitespace() && c != ' ') => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// A container's limit or request in units of the divisor, rounded up. A limit that is not set is the pod's, then what
/// the node has to give; a request that is not set is 0.
pub fn resource_value(
    selector: &ResourceFieldSelector,
    pod: &Pod,
    container: Option<&Container>,
    facts: &PodFacts,
) -> Result<String, ConfigError> {
    let invalid = |what: &str| ConfigError::Invalid(format!("resourceFieldRef {:?}: {what}", selector.resource));
    let spec = pod.spec.as_ref();
    let container = match selector.container_name.as_deref().filter(|name| !name.is_empty()) {
        None => container.ok_or_else(|| invalid("names no container"))?,
        Some(name) => spec
            .into_iter()
            .flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()))
            .find(|container| container.name == name)
            .ok_or_else(|| invalid(&format!("the pod has no container {name:?}")))?,
    };
    let Some((kind, resource)) = selector.resource.split_once('.') else {
        return Err(invalid("is not supported"));
    };
    // The kubelet counts CPU in thousandths and everything else in whole units before it divides.
    let unit = match resource {
        "cpu" => NANO / 1000,
        "memory" | "ephemeral-storage" => NANO,
        _ => return Err(invalid("is not supported")),
    };
    let given = |resources: Option<&ResourceRequirements>| {
        let list = match kind {
            "limits" => resources?.limits.as_ref(),
            _ => resources?.requests.as_ref(),
        };
        let quantity = list?.get(resource)?;
        Some(nanos(quantity).ok_or_else(|| invalid(&format!("{:?} is no quantity", quantity.0))))
    };
    let own = given(container.resources.as_ref()).transpose()?.filter(|value| *value != 0);
    let value = match (kind, own) {
        (_, Some(value)) => value,
        ("requests", None) => 0,
        ("limits", None) => match given(spec.and_then(|spec| spec.resources.as_ref())).transpose()? {
            Some(value) if value != 0 => value,
            _ => match resource {
                "cpu" => i128::from(facts.allocatable_cpu_millis) * unit,
                "memory" => i128::from(facts.allocatable_memory) * unit,
                _ => 0,
            },
        },
        _ => return Err(invalid("is not supported")),
    };
    let divisor = match &selector.divisor {
        Some(divisor) => nanos(divisor).ok_or_else(|| invalid("the divisor is no quantity"))?,
        None => 0,
    };
    let divisor = if divisor == 0 { NANO } else { divisor };
    Ok(ceiling(ceiling(value, unit), ceiling(divisor, unit)).to_string())
}

fn ceiling(value: i128, by: i128) -> i128 {
    value / by + i128::from(value % by > 0)
}

const NANO: i128 = 1_000_000_000;

/// A quantity in units of 10⁻⁹, rounded up (`"100m"` is 100 million), or None when it is none or out of range.
pub fn nanos(quantity: &Quantity) -> Option<i128> {
    let text = quantity.0.trim();
    let digits = text.find(|c: char| !matches!(c, '0'..='9' | '.' | '+' | '-')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let (power, base): (i32, i128) = match suffix {
        "n" => (-9, 10),
        "u" => (-6, 10),
        "m" => (-3, 10),
        "" => (0, 10),
        "k" => (3, 10),
        "M" => (6, 10),
        "G" => (9, 10),
        "T" => (12, 10),
        "P" => (15, 10),
        "E" => (18, 10),
        "Ki" => (1, 1024),
        "Mi" => (2, 1024),
        "Gi" => (3, 1024),
        "Ti" => (4, 1024),
        "Pi" => (5, 1024),
        "Ei" => (6, 1024),
        exponent => (exponent.strip_prefix(['e', 'E'])?.parse().ok()?, 10),
    };
    let (negative, number) = match number.strip_prefix('-') {
        Some(number) => (true, number),
        None => (false, number.strip_prefix('+').unwrap_or(number)),
    };
    if number.contains(['+', '-']) {
        return None;
    }
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let mantissa: i128 = format!("{whole}{fraction}").parse().ok()?;
    let scaled = |value: i128, power: u32, base: i128| value.checked_mul(base.checked_pow(power)?);
    let (mut value, mut shift) = (mantissa, 9 - i32::try_from(fraction.len()).ok()?);
    if base == 1024 {
        value = scaled(value, u32::try_from(power).ok()?, 1024)?;
    } else {
        shift = shift.checked_add(power)?;
    }
    let value = match u32::try_from(shift) {
        Ok(shift) => scaled(value, shift, 10)?,
        Err(_) => ceiling(value, 10_i128.checked_pow(shift.unsigned_abs())?),
    };
    Some(if negative { -value } else { value })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(spec: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {
                "name": "web", "namespace": "shop", "uid": "u-1",
                "labels": {"app": "web", "tier": "front"},
                "annotations": {"note": "two\nlines \"quoted\""},
            },
            "spec": spec,
        }))
        .unwrap()
    }

    fn sources() -> Sources {
        let config: ConfigMap = serde_json::from_value(json!({"data": {"COLOR": "blue", "SIZE": "10"}})).unwrap();
        let secret: Secret =
            serde_json::from_value(json!({"data": {"PASSWORD": "czNjcmV0", "COLOR": "cmVk", "binary": "/w=="}}))
                .unwrap();
        Sources {
            namespace: "shop".into(),
            config_maps: [("config".to_owned(), config)].into(),
            secrets: [("secret".to_owned(), secret)].into(),
        }
    }

    fn facts() -> PodFacts {
        PodFacts {
            node_name: "node-1".into(),
            host_ip: "10.0.0.2".into(),
            pod_ip: "10.0.0.2".into(),
            allocatable_cpu_millis: 2000,
            allocatable_memory: 4 << 30,
        }
    }

    fn environment(container: Value) -> Result<ContainerEnvironment, ConfigError> {
        let mut container = container;
        container["name"] = json!("app");
        let pod = pod(json!({"nodeName": "node-1", "serviceAccountName": "robot", "containers": [container]}));
        let container = &pod.spec.as_ref().unwrap().containers[0];
        assemble(&pod, container, &facts(), &sources())
    }

    fn value(variable: Value) -> Result<String, ConfigError> {
        let mut variable = variable;
        variable["name"] = json!("X");
        let found = environment(json!({"env": [variable]}))?;
        Ok(found.env.iter().find(|(name, _)| name == "X").map_or("(unset)".into(), |(_, value)| value.clone()))
    }

    #[test]
    fn a_literal_refers_to_what_was_declared_before_it_and_to_nothing_after() {
        let found = environment(json!({"env": [
            {"name": "A", "value": "1"}, {"name": "B", "value": "$(A)$(C)"}, {"name": "C", "value": "3"},
            {"name": "A", "value": "again $(A)"},
        ]}))
        .unwrap();
        let expected = [("A", "again 1"), ("B", "1$(C)"), ("C", "3")];
        assert_eq!(found.env, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn a_doubled_dollar_escapes_a_reference_and_a_broken_reference_stays_as_it_is() {
        let mut variables = Variables::default();
        variables.set("VAR".into(), "x".into()).unwrap();
        for (text, expected) in [
            ("$(VAR)", "x"),
            ("$$(VAR)", "$(VAR)"),
            ("$$$(VAR)", "$x"),
            ("$$$$(VAR)", "$$(VAR)"),
            ("a$(VAR)b$(VAR)", "axbx"),
            ("$(VAR", "$(VAR"),
            ("$VAR $", "$VAR $"),
            ("$(NONE) $()", "$(NONE) $()"),
            ("ü$ü$(VAR)ü", "ü$üxü"),
            ("$((VAR))", "$((VAR))"),
        ] {
            assert_eq!(variables.expand(text), expected, "{text}");
        }
    }

    #[test]
    fn command_and_args_are_joined_and_expanded() {
        let found = environment(json!({
            "command": ["run", "$(A)"], "args": ["$$(A)", "--x=$(A)", "$(B)"], "env": [{"name": "A", "value": "1"}],
        }))
        .unwrap();
        assert_eq!(found.args, ["run", "1", "$(A)", "--x=1", "$(B)"]);
    }

    #[test]
    fn later_sources_override_earlier_ones_and_env_overrides_them_all() {
        let found = environment(json!({
            "envFrom": [
                {"configMapRef": {"name": "config"}},
                {"prefix": "P_", "configMapRef": {"name": "config"}},
                {"configMapRef": {"name": "none", "optional": true}},
            ],
            "env": [{"name": "SIZE", "value": "$(COLOR) $(SIZE)"}],
        }))
        .unwrap();
        let expected = [("COLOR", "blue"), ("SIZE", "blue 10"), ("P_COLOR", "blue"), ("P_SIZE", "10")];
        assert_eq!(found.env, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn a_key_of_a_config_map_or_a_secret_becomes_a_value() {
        let config = |key: &str| json!({"valueFrom": {"configMapKeyRef": {"name": "config", "key": key}}});
        assert_eq!(value(config("COLOR")).unwrap(), "blue");
        assert!(
            matches!(value(config("NONE")), Err(ConfigError::Missing(m)) if m.contains("shop/config") && m.contains("NONE"))
        );
        let secret = |name: &str| json!({"valueFrom": {"secretKeyRef": {"name": name, "key": "PASSWORD"}}});
        assert_eq!(value(secret("secret")).unwrap(), "s3cret");
        assert!(matches!(value(secret("none")), Err(ConfigError::Missing(m)) if m.contains("Secret shop/none")));
    }

    #[test]
    fn an_optional_key_that_is_missing_leaves_the_variable_unset() {
        for source in ["configMapKeyRef", "secretKeyRef"] {
            for (name, key) in [("none", "COLOR"), ("config", "NONE"), ("secret", "NONE")] {
                let variable = json!({"valueFrom": {source: {"name": name, "key": key, "optional": true}}});
                assert_eq!(value(variable).unwrap(), "(unset)");
            }
        }
    }

    #[test]
    fn what_no_process_can_be_given_is_refused() {
        let binary = json!({"valueFrom": {"secretKeyRef": {"name": "secret", "key": "binary"}}});
        assert!(matches!(value(binary), Err(ConfigError::Invalid(m)) if m.contains("UTF-8")));
        assert!(matches!(value(json!({"value": "a\u{0}b"})), Err(ConfigError::Invalid(_))));
        let file = json!({"valueFrom": {"fileKeyRef": {"volumeName": "v", "path": "p", "key": "k"}}});
        assert!(matches!(value(file), Err(ConfigError::Invalid(m)) if m.contains("fileKeyRef")));
    }

    #[test]
    fn fields_of_the_pod_become_values() {
        for (path, expected) in [
            ("metadata.name", "web"),
            ("metadata.namespace", "shop"),
            ("metadata.uid", "u-1"),
            ("metadata.labels['app']", "web"),
            ("metadata.labels['none']", ""),
            ("metadata.labels", "app=\"web\"\ntier=\"front\""),
            ("metadata.annotations", "note=\"two\\nlines \\\"quoted\\\"\""),
            ("metadata.annotations['note']", "two\nlines \"quoted\""),
            ("spec.nodeName", "node-1"),
            ("spec.serviceAccountName", "robot"),
            ("status.hostIP", "10.0.0.2"),
            ("status.hostIPs", "10.0.0.2"),
            ("status.podIP", "10.0.0.2"),
            ("status.podIPs", "10.0.0.2"),
        ] {
            let variable = json!({"valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}});
            assert_eq!(value(variable).unwrap(), expected, "{path}");
        }
        let unknown = json!({"valueFrom": {"fieldRef": {"fieldPath": "status.phase"}}});
        assert!(matches!(value(unknown), Err(ConfigError::Invalid(m)) if m.contains("status.phase")));
    }

    #[test]
    fn resources_are_divided_and_rounded_up_and_limits_default_to_the_node() {
        let resources = json!({"limits": {"cpu": "1500m", "memory": "64Mi"}, "requests": {"cpu": "250m"}});
        let read = |resource: &str, divisor: &str, resources: &Value| {
            let field = json!({"resource": resource, "divisor": divisor});
            environment(json!({
                "resources": resources, "env": [{"name": "X", "valueFrom": {"resourceFieldRef": field}}],
            }))
            .map(|found| found.env[0].1.clone())
        };
        for (resource, divisor, expected) in [
            ("limits.cpu", "0", "2"),
            ("limits.cpu", "1m", "1500"),
            ("limits.memory", "0", "67108864"),
            ("limits.memory", "1Mi", "64"),
            ("limits.memory", "1G", "1"),
            ("requests.cpu", "1m", "250"),
            ("requests.memory", "1", "0"),
        ] {
            assert_eq!(read(resource, divisor, &resources).unwrap(), expected, "{resource} by {divisor}");
        }
        assert_eq!(read("limits.cpu", "1m", &json!({})).unwrap(), "2000");
        assert_eq!(read("limits.memory", "1Gi", &json!({})).unwrap(), "4");
        assert!(read("limits.gold", "1", &json!({})).is_err());
        assert!(read("cpu", "1", &json!({})).is_err());
    }

    #[test]
    fn quantities_are_read_in_every_spelling() {
        for (text, expected) in [
            ("1", Some(NANO)),
            ("100m", Some(NANO / 10)),
            ("1.5", Some(NANO * 3 / 2)),
            (".5Ki", Some(512 * NANO)),
            ("2e3", Some(2000 * NANO)),
            ("1E", Some(1_000_000_000_000_000_000 * NANO)),
            ("-1n", Some(-1)),
            ("0.1n", Some(1)),
            ("7Ei", Some((7 << 60) * NANO)),
            ("", None),
            ("1Q", None),
            ("1e99", None),
            ("99999999999999999999999999999999999999999", None),
            ("--1", None),
        ] {
            assert_eq!(nanos(&Quantity(text.into())), expected, "{text}");
        }
    }
}
