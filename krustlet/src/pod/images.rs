//! Getting a container's image: pull policy, the pod's own registry secrets, and the Events that tell about it.

use super::context::NodeContext;
use super::namespace;
use super::sources::while_forbidden;
use crate::client::{describe, status_code};
use crate::events::{Recorder, Severity};
use crate::reasons::event;
use k8s_openapi::api::core::v1::{Container, Pod, Secret};
use krustlet_runtime::{Builder, DockerConfig, Image, PullError, PullPolicy, RegistrySecret};
use kube::api::Api;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::time::Instant;

/// How many Secrets are remembered: those of a node's pods, and then some.
const REMEMBERED: usize = 4096;

/// What the pods' registry secrets held when they were last read: a container is started again while the API server is
/// away, and has to show its right to the image then too. In memory alone, as with the kubelet.
#[derive(Default)]
pub struct PullSecrets(Mutex<HashMap<String, Secret>>);

impl PullSecrets {
    async fn get(&self, api: &Api<Secret>, namespace: &str, name: &str) -> Result<Secret, kube::Error> {
        let key = format!("{namespace}/{name}");
        match while_forbidden(|| api.get(name)).await {
            Ok(secret) => {
                let mut known = self.0.lock();
                if known.len() >= REMEMBERED {
                    known.clear();
                }
                known.insert(key, secret.clone());
                Ok(secret)
            }
            // An answer of the API server counts, also that there is none, or that it is not for this node.
            Err(error) => match status_code(&error) {
                Some(code) if code < 500 => {
                    self.0.lock().remove(&key);
                    Err(error)
                }
                _ => self.0.lock().get(&key).cloned().ok_or(error),
            },
        }
    }
}

/// Who must have built the images of a namespace's pods.
#[derive(Debug, Default)]
pub struct Builders(HashMap<String, Vec<Builder>>);

impl Builders {
    pub fn new(required: &[(String, Builder)]) -> Self {
        let mut by_namespace = HashMap::<String, Vec<Builder>>::new();
        for (namespace, builder) in required {
            by_namespace.entry(namespace.clone()).or_default().push(builder.clone());
        }
        Self(by_namespace)
    }

    /// Those that are named for it, else those for every namespace; none where nothing is asked for.
    fn of(&self, namespace: &str) -> &[Builder] {
        self.0.get(namespace).or_else(|| self.0.get("*")).map_or(&[], Vec::as_slice)
    }
}

/// The policy that the container asks for; without one, as Kubernetes: always for the tag `latest`.
pub fn policy(container: &Container) -> PullPolicy {
    match container.image_pull_policy.as_deref() {
        Some("Always") => PullPolicy::Always,
        Some("Never") => PullPolicy::Never,
        Some(_) => PullPolicy::IfNotPresent,
        None => {
            let image = container.image.as_deref().unwrap_or_default();
            let name = image.rsplit('/').next().unwrap_or(image);
            let latest = !name.contains('@') && (!name.contains(':') || name.ends_with(":latest"));
            if latest { PullPolicy::Always } else { PullPolicy::IfNotPresent }
        }
    }
}

/// Has the container's image on the node, and the pod's right to it shown.
pub async fn get(node: &NodeContext, pod: &Pod, container: &Container) -> Result<Image, PullError> {
    let (runtime, events) = (&node.runtime, &node.events);
    let builders = node.builders.of(namespace(pod));
    let name = container.image.as_deref().unwrap_or_default();
    let tell = |severity, reason, message: String| events.pod(pod, Some(&container.name), severity, reason, message);
    let policy = policy(container);
    let present = |image| {
        tell(Severity::Normal, event::PULLED, format!("Image {name:?} is already on this node"));
        Ok(image)
    };
    if policy != PullPolicy::Always {
        // The usual case costs no call to anybody: what is on the node for every pod was checked when it came.
        match runtime.pull_built_by(name, PullPolicy::Never, &[], builders).await {
            Ok(image) => return present(image),
            // Not here, or not for every pod, or without a signature that counts: the registry may have one by now.
            Err(PullError::NeverPull { .. } | PullError::Signature { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let secrets = secrets(&node.client, events, &node.pull_secrets, pod).await;
    if policy != PullPolicy::Always {
        match runtime.pull_built_by(name, PullPolicy::Never, &secrets, builders).await {
            Ok(image) => return present(image),
            Err(PullError::NeverPull { .. } | PullError::Signature { .. }) if policy == PullPolicy::IfNotPresent => {}
            Err(error) => return Err(error),
        }
    }
    tell(Severity::Normal, event::PULLING, format!("Pulling image {name:?}"));
    let begun = Instant::now();
    let image = runtime.pull_built_by(name, policy, &secrets, builders).await?;
    let took = begun.elapsed();
    let message = if image.cached {
        format!("Image {name:?} is still {} in its registry, and already on this node", image.digest)
    } else {
        format!("Pulled and verified image {name:?} ({}) in {took:.0?}, {} bytes", image.digest, image.size)
    };
    tell(Severity::Normal, event::PULLED, message);
    Ok(image)
}

/// The registry secrets that the pod names. What is missing or unusable is told and left out, as the kubelet does: the
/// registry decides whether it was needed.
async fn secrets(client: &kube::Client, events: &Recorder, known: &PullSecrets, pod: &Pod) -> Vec<RegistrySecret> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace(pod));
    let mut found = Vec::new();
    let references = pod.spec.iter().flat_map(|spec| spec.image_pull_secrets.iter().flatten());
    for reference in references.filter(|reference| !reference.name.is_empty()) {
        let result = match known.get(&api, namespace(pod), &reference.name).await {
            Ok(secret) => credentials(&secret),
            Err(error) if status_code(&error) == Some(404) => Err("there is no such Secret".to_owned()),
            Err(error) => Err(describe(&error)),
        };
        let unusable = match result {
            Ok(config) => {
                found.extend(config.secrets);
                config.unusable
            }
            Err(cause) => vec![cause],
        };
        if !unusable.is_empty() {
            events.pod(
                pod,
                None,
                Severity::Warning,
                event::FAILED_PULL_SECRET,
                format!("imagePullSecret {:?}: {}", reference.name, summary(&unusable)),
            );
        }
    }
    found
}

/// The first causes, and how many more there are: a Secret may hold some thousands.
fn summary(causes: &[String]) -> String {
    const SHOWN: usize = 3;
    let first = causes.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join("; ");
    match causes.len().checked_sub(SHOWN) {
        None | Some(0) => first,
        Some(more) => format!("{first}; and {more} more"),
    }
}

/// What a Secret holds, each with the Secret as its source.
fn credentials(secret: &Secret) -> Result<DockerConfig, String> {
    let data = |key: &str| secret.data.as_ref()?.get(key);
    let mut config = match (data(".dockerconfigjson"), data(".dockercfg")) {
        (Some(document), _) => DockerConfig::from_config_json(&document.0)?,
        (None, Some(document)) => DockerConfig::from_dockercfg(&document.0)?,
        (None, None) => return Err("it has neither .dockerconfigjson nor .dockercfg".to_owned()),
    };
    let part = |part: &Option<String>| part.clone().unwrap_or_default();
    let metadata = &secret.metadata;
    let source = format!("{}/{}/{}", part(&metadata.namespace), part(&metadata.name), part(&metadata.uid));
    for found in &mut config.secrets {
        found.source = Some(source.clone());
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::Cluster;

    #[test]
    fn a_policy_that_is_given_is_followed() {
        for (given, expected) in
            [("Always", PullPolicy::Always), ("IfNotPresent", PullPolicy::IfNotPresent), ("Never", PullPolicy::Never)]
        {
            let container = Container { image_pull_policy: Some(given.into()), ..Container::default() };
            assert_eq!(policy(&container), expected);
        }
    }

    #[test]
    fn without_a_policy_only_latest_is_always_pulled() {
        for (image, expected) in [
            ("registry:5000/app", PullPolicy::Always),
            ("registry:5000/app:latest", PullPolicy::Always),
            ("registry:5000/app:1.0", PullPolicy::IfNotPresent),
            ("registry:5000/app@sha256:00", PullPolicy::IfNotPresent),
        ] {
            let container = Container { image: Some(image.into()), ..Container::default() };
            assert_eq!(policy(&container), expected, "{image}");
        }
    }

    #[test]
    fn a_secret_of_another_kind_is_refused_by_name_of_what_it_lacks() {
        assert!(credentials(&Secret::default()).err().unwrap().contains(".dockerconfigjson"));
    }

    #[test]
    fn a_namespace_that_is_named_has_its_own_builders_and_others_those_of_all() {
        let required = [("*", "urn:all"), ("prod", "urn:a"), ("prod", "urn:b")]
            .map(|(namespace, builder)| (namespace.to_owned(), builder.parse().unwrap()));
        let shown = |builders: &Builders, namespace| -> Vec<String> {
            builders.of(namespace).iter().map(ToString::to_string).collect()
        };
        assert_eq!(shown(&Builders::new(&required), "prod"), ["urn:a", "urn:b"]);
        assert_eq!(shown(&Builders::new(&required), "shop"), ["urn:all"]);
        assert!(shown(&Builders::new(&required[1..]), "shop").is_empty());
    }

    #[tokio::test]
    async fn a_pod_that_the_authorizer_does_not_know_yet_gets_its_secret() {
        let cluster = Cluster::forbidding(2);
        cluster.put("secrets", "pull", serde_json::json!({"metadata": {"namespace": "shop", "name": "pull"}}));
        let api = Api::namespaced(cluster.client(), "shop");
        assert!(PullSecrets::default().get(&api, "shop", "pull").await.is_ok());
        assert_eq!(cluster.reads(), 3);
    }

    #[test]
    fn what_a_secret_holds_is_known_as_its_own() {
        let secret: Secret = serde_json::from_value(serde_json::json!({
            "metadata": {"namespace": "shop", "name": "pull", "uid": "u-1"},
            // {"auths": {"ghcr.io": {}, "host.io": {"auth": "dXNlcjp3b3Jk"}}}
            "data": {".dockerconfigjson":
                "eyJhdXRocyI6IHsiZ2hjci5pbyI6IHt9LCAiaG9zdC5pbyI6IHsiYXV0aCI6ICJkWE5sY2pwM2IzSmsifX19"},
        }))
        .unwrap();
        let config = credentials(&secret).unwrap();
        assert_eq!(config.secrets.len(), 1);
        assert_eq!(config.secrets[0].source.as_deref(), Some("shop/pull/u-1"));
        assert!(config.unusable.is_empty());
    }

    #[test]
    fn a_message_does_not_grow_with_the_secret() {
        let causes = vec!["no".to_owned(); 10_000];
        assert_eq!(summary(&causes), "no; no; no; and 9997 more");
        assert_eq!(summary(&causes[..3]), "no; no; no");
    }
}
