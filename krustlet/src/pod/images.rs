//! Getting a container's image: pull policy, the pod's own registry secrets, and the Events that tell about it.

use super::namespace;
use crate::client::{describe, status_code};
use crate::events::{Recorder, Severity};
use crate::reasons::event;
use k8s_openapi::api::core::v1::{Container, Pod, Secret};
use krustlet_runtime::{Image, PullError, PullPolicy, RegistrySecret, Runtime};
use kube::api::Api;
use std::time::Instant;

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

/// Has the container's image on the node.
pub async fn get(
    client: &kube::Client,
    runtime: &Runtime,
    events: &Recorder,
    pod: &Pod,
    container: &Container,
) -> Result<Image, PullError> {
    let name = container.image.as_deref().unwrap_or_default();
    let tell = |severity, reason, message: String| events.pod(pod, Some(&container.name), severity, reason, message);
    let policy = policy(container);
    if policy != PullPolicy::Always {
        // The usual case costs no call to anybody: what is on the node was checked when it came.
        match runtime.pull(name, PullPolicy::Never, &[]).await {
            Ok(image) => {
                tell(Severity::Normal, event::PULLED, format!("Image {name:?} is already on this node"));
                return Ok(image);
            }
            // Not here, or here without a signature that counts: the registry may have one by now.
            Err(PullError::NeverPull { .. } | PullError::Signature { .. }) if policy == PullPolicy::IfNotPresent => {}
            Err(error) => return Err(error),
        }
    }
    tell(Severity::Normal, event::PULLING, format!("Pulling image {name:?}"));
    let secrets = secrets(client, events, pod).await;
    let begun = Instant::now();
    let image = runtime.pull(name, policy, &secrets).await?;
    let took = begun.elapsed();
    let message = if image.cached {
        format!("Image {name:?} is still {} in its registry, and already on this node", image.digest)
    } else {
        format!("Pulled and verified image {name:?} ({}) in {took:.0?}, {} bytes", image.digest, image.size)
    };
    tell(Severity::Normal, event::PULLED, message);
    Ok(image)
}

/// The registry secrets that the pod names. One that is missing or unreadable is told and left out, as the kubelet does:
/// the registry decides whether it was needed.
async fn secrets(client: &kube::Client, events: &Recorder, pod: &Pod) -> Vec<RegistrySecret> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace(pod));
    let mut found = Vec::new();
    for reference in pod.spec.iter().flat_map(|spec| spec.image_pull_secrets.iter().flatten()) {
        let result = match api.get(&reference.name).await {
            Ok(secret) => credentials(&secret),
            Err(error) if status_code(&error) == Some(404) => Err("there is no such Secret".to_owned()),
            Err(error) => Err(describe(&error)),
        };
        match result {
            Ok(secrets) => found.extend(secrets),
            Err(cause) => events.pod(
                pod,
                None,
                Severity::Warning,
                event::FAILED_PULL_SECRET,
                format!("imagePullSecret {:?} cannot be used: {cause}", reference.name),
            ),
        }
    }
    found
}

fn credentials(secret: &Secret) -> Result<Vec<RegistrySecret>, String> {
    let data = secret.data.as_ref();
    let document = [".dockerconfigjson", ".dockercfg"].iter().find_map(|key| data?.get(*key));
    match document {
        Some(document) => RegistrySecret::from_docker_config(&document.0),
        None => Err("it has neither .dockerconfigjson nor .dockercfg".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
