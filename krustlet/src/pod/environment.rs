//! A container's environment and arguments: literals, ConfigMaps, Secrets, fields of the pod, `$(VAR)` references.
//!
//! The rules are the kubelet's; what it all may take together is the kernel's order of size. References multiply: nine
//! variables, each ten references to the one before, make ten bytes to ten gigabytes.

use super::fields::{PodFacts, field_value, resource_value};
use super::sources::{ConfigError, Objects, Sources, Wanted, missing_key};
use k8s_openapi::api::core::v1::{Container, EnvVarSource, Pod};
use std::collections::HashMap;
use std::time::Instant;

/// Bytes that a container's environment and arguments may take together.
const MAX_BYTES: usize = 1 << 20;
/// What each variable and argument takes besides its text.
const EACH: usize = 32;
/// Bytes of a path, as on Linux.
const MAX_PATH: usize = 4096;

/// What a container's process is started with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContainerEnvironment {
    pub env: Vec<(String, String)>,
    /// `command`, then `args`, with their `$(VAR)` references expanded.
    pub args: Vec<String>,
}

impl ContainerEnvironment {
    /// Bytes that it takes.
    pub fn size(&self) -> usize {
        let variables = self.env.iter().map(|(name, value)| name.len() + value.len() + 2 * size_of::<String>());
        variables.chain(self.args.iter().map(|word| word.len() + size_of::<String>())).sum()
    }

    /// A mount's `subPathExpr` with its references expanded. Unlike in a variable, each must be one.
    pub fn expand_path(&self, path: &str) -> Result<String, ConfigError> {
        let variables: HashMap<&str, &str> =
            self.env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let mut missing = None;
        let expanded = expand(path, MAX_PATH, |name| {
            let value = variables.get(name).copied();
            if value.is_none() {
                missing.get_or_insert_with(|| name.to_owned());
            }
            value
        });
        if let Some(name) = missing {
            return Err(ConfigError::Invalid(format!("subPathExpr {path:?}: the container has no variable {name:?}")));
        }
        expanded.ok_or_else(|| ConfigError::Invalid(format!("subPathExpr {path:?} is longer than a path may be")))
    }
}

/// Reads what the container refers to, then puts its environment together. Nothing of it is older than `not_before`.
pub async fn resolve(
    objects: &Objects,
    pod: &Pod,
    container: &Container,
    facts: &PodFacts,
    not_before: Instant,
) -> Result<ContainerEnvironment, ConfigError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let wanted = Wanted::by_environment(container);
    let sources = objects.read(namespace, &wanted, not_before).await?;
    assemble(pod, container, facts, &sources)
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
                variables.set(&format!("{prefix}{key}"), value)?;
            }
        }
        if let Some(reference) = &source.secret_ref
            && let Some(object) = sources.secret(&reference.name, reference.optional == Some(true))?
        {
            for (key, value) in object.data.iter().flatten() {
                let value = utf8(&value.0, "Secret", &reference.name, key)?;
                variables.set(&format!("{prefix}{key}"), &value)?;
            }
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match (&variable.value, &variable.value_from) {
            (Some(literal), _) if !literal.is_empty() => {
                Some(variables.expand(literal, &format!("variable {}", variable.name))?)
            }
            (_, Some(source)) => from_source(source, pod, container, facts, sources)?,
            _ => Some(String::new()),
        };
        if let Some(value) = value {
            variables.set(&variable.name, &value)?;
        }
    }
    let words = container.command.iter().flatten().chain(container.args.iter().flatten());
    let mut args = Vec::new();
    for (number, word) in words.enumerate() {
        let what = format!("argument {number}");
        let word = variables.expand(word, &what)?;
        variables.take(word.len(), &what)?;
        args.push(word);
    }
    Ok(ContainerEnvironment { env: variables.list, args })
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

fn utf8(bytes: &[u8], kind: &str, name: &str, key: &str) -> Result<String, ConfigError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| {
        ConfigError::Invalid(format!(
            "{kind} {name}, key {key:?}: a variable must be UTF-8; mount it as a file instead"
        ))
    })
}

/// Variables in the order of their first mention; a later value takes the earlier one's place.
#[derive(Debug)]
struct Variables {
    list: Vec<(String, String)>,
    /// Name → place in the list.
    places: HashMap<String, usize>,
    /// Bytes that are left.
    left: usize,
}

impl Default for Variables {
    fn default() -> Self {
        Self { list: Vec::new(), places: HashMap::new(), left: MAX_BYTES }
    }
}

impl Variables {
    fn set(&mut self, name: &str, value: &str) -> Result<(), ConfigError> {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(ConfigError::Invalid(format!("environment variable {name:?} cannot be passed to a process")));
        }
        let size = |value: &str| name.len() + value.len() + EACH;
        let place = self.places.get(name).copied();
        if let Some((_, before)) = place.and_then(|place| self.list.get(place)) {
            self.left += size(before);
        }
        self.left = self.left.checked_sub(size(value)).ok_or_else(|| too_large(&format!("variable {name}")))?;
        match place.and_then(|place| self.list.get_mut(place)) {
            Some(known) => value.clone_into(&mut known.1),
            None => {
                self.places.insert(name.to_owned(), self.list.len());
                self.list.push((name.to_owned(), value.to_owned()));
            }
        }
        Ok(())
    }

    fn take(&mut self, bytes: usize, what: &str) -> Result<(), ConfigError> {
        self.left = self.left.checked_sub(bytes + EACH).ok_or_else(|| too_large(what))?;
        Ok(())
    }

    /// References to what is known so far are replaced, the others stay as they are.
    fn expand(&self, text: &str, what: &str) -> Result<String, ConfigError> {
        let known = |name: &str| Some(self.list.get(*self.places.get(name)?)?.1.as_str());
        // A variable may take the place of itself, so that the whole is the bound here, and not what is left of it.
        expand(text, MAX_BYTES, known).ok_or_else(|| too_large(what))
    }
}

fn too_large(what: &str) -> ConfigError {
    ConfigError::Invalid(format!(
        "{what}: the container's environment and arguments take more than {} KiB together; large data belongs in a volume",
        MAX_BYTES >> 10
    ))
}

/// Replaces `$(NAME)` by what `value` gives, `$$` by `$`, and leaves everything else as it is. None when the result would be
/// longer than `limit`; it is never more than that in memory, nor does it take longer than reading text and result once.
fn expand<'a>(text: &str, limit: usize, mut value: impl FnMut(&str) -> Option<&'a str>) -> Option<String> {
    let mut out = String::with_capacity(text.len().min(limit));
    let mut rest = text;
    // Behind the last one no reference ends any more: none is to be looked for again and again.
    let last_end = text.rfind(')').map_or(usize::MAX, |at| text.len() - at);
    let push = |out: &mut String, part: &str| (out.len() + part.len() <= limit).then(|| out.push_str(part));
    while let Some(at) = rest.find('$') {
        push(&mut out, &rest[..at])?;
        let after = &rest[at + 1..];
        let reference =
            after.strip_prefix('(').filter(|_| after.len() >= last_end).and_then(|inner| inner.split_once(')'));
        rest = if let Some(literal) = after.strip_prefix('$') {
            push(&mut out, "$")?;
            literal
        } else if let Some((name, tail)) = reference {
            match value(name) {
                Some(value) => push(&mut out, value)?,
                None => push(&mut out, &rest[at..rest.len() - tail.len()])?,
            }
            tail
        } else {
            push(&mut out, "$")?;
            after
        };
    }
    push(&mut out, rest)?;
    Some(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{ConfigMap, Secret};
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
            config_maps: [("config".to_owned(), config.into())].into(),
            secrets: [("secret".to_owned(), secret.into())].into(),
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
        variables.set("VAR", "x").unwrap();
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
            assert_eq!(variables.expand(text, "T").unwrap(), expected, "{text}");
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
    fn nine_variables_of_ten_references_each_are_refused_and_the_one_that_is_too_much_is_named() {
        let mut env = vec![json!({"name": "V0", "value": "0123456789"})];
        for number in 1..=9 {
            env.push(json!({"name": format!("V{number}"), "value": format!("$(V{})", number - 1).repeat(10)}));
        }
        let error = environment(json!({"env": env})).unwrap_err();
        assert!(matches!(&error, ConfigError::Invalid(m) if m.contains("V5") && m.contains("1024 KiB")), "{error}");
    }

    #[test]
    fn every_way_to_multiply_is_bounded() {
        let hundred = "x".repeat(100 << 10);
        let big = json!({"name": "BIG", "value": hundred});
        let field = json!({"fieldRef": {"fieldPath": "metadata.annotations"}});
        let config = json!({"configMapRef": {"name": "config"}});
        let prefixed = |number: usize| json!({"prefix": format!("P{number}_"), "configMapRef": {"name": "config"}});
        for (container, named) in [
            (json!({"env": [big], "args": vec!["$(BIG)"; 11]}), "argument"),
            (json!({"env": [big], "command": ["$(BIG)".repeat(11)]}), "argument 0"),
            (json!({"env": [big], "args": vec!["x"; 40_000]}), "argument"),
            (json!({"env": (0..40_000).map(|n| json!({"name": format!("E{n}")})).collect::<Vec<_>>()}), "variable E"),
            (
                json!({"env": (0..30_000).map(|n| json!({"name": format!("F{n}"), "valueFrom": field})).collect::<Vec<_>>()}),
                "F",
            ),
            (json!({"envFrom": (0..20_000).map(prefixed).collect::<Vec<_>>()}), "variable P"),
        ] {
            let error = environment(container).unwrap_err();
            assert!(matches!(&error, ConfigError::Invalid(m) if m.contains(named)), "{error}");
        }
        // The same names again and again take no more than once.
        environment(json!({"envFrom": vec![config; 1000], "env": vec![big; 30]})).unwrap();
    }

    #[test]
    fn text_that_looks_like_a_million_references_is_read_in_one_pass() {
        let begin = Instant::now();
        for text in
            ["$(".repeat(500_000), format!(")){}", "$(".repeat(500_000)), "$".repeat(1_000_000), "$(A)".repeat(250_000)]
        {
            let found = environment(json!({"env": [{"name": "A", "value": ""}, {"name": "T", "value": text}]}));
            assert!(found.is_ok(), "{found:?}");
        }
        // A second pass for each of them would take hours.
        assert!(begin.elapsed() < std::time::Duration::from_secs(20));
    }

    /// Any graph of references: what comes of it is within the bound, or an error.
    #[test]
    fn whatever_refers_to_whatever_the_result_is_bounded() {
        use rand::{RngExt as _, SeedableRng as _};
        let seed: u64 =
            std::env::var("KRUSTLET_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
        let mut random = rand::rngs::StdRng::seed_from_u64(seed);
        let (mut refused, mut taken) = (0, 0);
        for _ in 0..300 {
            let names = random.random_range(1..12);
            let word = |random: &mut rand::rngs::StdRng| -> String {
                (0..random.random_range(0..40))
                    .map(|_| match random.random_range(0..8) {
                        0 => "$$".to_owned(),
                        1 => "$(".to_owned(),
                        2 => ")".to_owned(),
                        3 => "x".repeat(random.random_range(0..500)),
                        _ => format!("$(V{})", random.random_range(0..names)),
                    })
                    .collect()
            };
            let count = random.random_range(0..25);
            let env: Vec<_> = (0..count)
                .map(|_| json!({"name": format!("V{}", random.random_range(0..names)), "value": word(&mut random)}))
                .collect();
            let args: Vec<_> = (0..random.random_range(0..20)).map(|_| word(&mut random)).collect();
            match environment(json!({"env": env, "args": args})) {
                Ok(found) => {
                    taken += 1;
                    let env: usize = found.env.iter().map(|(name, value)| name.len() + value.len()).sum();
                    let args: usize = found.args.iter().map(String::len).sum();
                    assert!(env + args <= MAX_BYTES, "seed {seed}");
                    assert!(found.env.iter().all(|(_, value)| value.capacity() <= 2 * MAX_BYTES), "seed {seed}");
                }
                Err(error) => {
                    refused += 1;
                    assert!(
                        matches!(&error, ConfigError::Invalid(m) if m.contains("1024 KiB")),
                        "seed {seed}: {error}"
                    );
                }
            }
        }
        assert!(refused > 0 && taken > 0, "seed {seed}: {refused} refused, {taken} taken");
    }

    #[test]
    fn a_path_has_its_references_expanded_and_each_must_be_a_variable() {
        let environment = environment(json!({"env": [
            {"name": "POD", "value": "web-1"}, {"name": "LONG", "value": "x".repeat(5000)},
        ]}))
        .unwrap();
        assert_eq!(environment.expand_path("logs/$(POD)/$$x").unwrap(), "logs/web-1/$x");
        assert!(environment.expand_path("$(NONE)").unwrap_err().to_string().contains("NONE"));
        assert!(environment.expand_path("$(LONG)").unwrap_err().to_string().contains("longer"));
    }
}
