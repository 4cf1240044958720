//! From a name to a verified image: what is accepted, what is refused, and what is asked of the registry.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use common::{Node, Registry, Signer, digest, until};
use futures::future::{BoxFuture, join_all};
use krustlet_runtime::{CredentialSource, NoCredentials, PullError, PullPolicy, RegistrySecret, Verification};
use serde_json::json;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

const MODULE: &[u8] = b"\0asm not to be compiled here";

fn trusting(signers: &[&Signer]) -> Verification {
    Verification::Keys(signers.iter().map(|signer| signer.public_key()).collect())
}

/// A node that trusts one key, and an image that this key signed.
async fn signed() -> (Node, Signer, String) {
    let signer = Signer::new(1);
    let node = Node::with(trusting(&[&signer]), Arc::new(NoCredentials)).await;
    let manifest = node.registry.push("v1", MODULE);
    node.registry.sign(&manifest, &signer, &manifest);
    (node, signer, manifest)
}

async fn refused(node: &Node, image: &str, policy: PullPolicy) -> PullError {
    node.runtime.pull(image, policy, &[]).await.unwrap_err()
}

#[tokio::test]
async fn a_signed_image_is_pulled_once_and_then_needs_no_network() {
    let (node, _, manifest) = signed().await;
    let name = node.registry.image(&manifest);
    let image = node.runtime.pull(&name, PullPolicy::IfNotPresent, &[]).await.unwrap();
    assert_eq!(
        (image.reference.as_str(), image.digest.as_str(), image.cached),
        (name.as_str(), manifest.as_str(), false)
    );
    assert_eq!((image.layer, image.size), (digest(MODULE), MODULE.len() as u64));
    node.registry.state(|state| state.down = true);
    for policy in [PullPolicy::IfNotPresent, PullPolicy::Never] {
        assert!(node.runtime.pull(&name, policy, &[]).await.unwrap().cached);
    }
}

#[tokio::test]
async fn a_tag_is_asked_for_again_under_always_and_only_then() {
    let (node, signer, first) = signed().await;
    let name = node.registry.image("v1");
    assert_eq!(node.runtime.pull(&name, PullPolicy::IfNotPresent, &[]).await.unwrap().digest, first);
    let second = node.registry.push("v1", b"\0asm another module");
    node.registry.sign(&second, &signer, &second);
    assert_eq!(node.runtime.pull(&name, PullPolicy::IfNotPresent, &[]).await.unwrap().digest, first);
    assert_eq!(node.runtime.pull(&name, PullPolicy::Always, &[]).await.unwrap().digest, second);
    assert_eq!(node.runtime.pull(&name, PullPolicy::Never, &[]).await.unwrap().digest, second);
    node.registry.state(|state| state.down = true);
    assert_eq!(refused(&node, &name, PullPolicy::Always).await.reason(), "ErrImagePull");
}

/// Signs the image with a manifest's digest, or does not.
type Sign<'a> = &'a dyn Fn(&str);

#[tokio::test]
async fn an_image_without_a_good_signature_is_refused_before_its_module_is_fetched() {
    let (node, signer, _) = signed().await;
    let other = Signer::new(2);
    let cases: [(&str, Sign, &str); 3] = [
        ("unsigned", &|_| {}, "not signed"),
        ("other-key", &|manifest| node.registry.sign(manifest, &other, manifest), "by a key"),
        ("other-digest", &|manifest| node.registry.sign(manifest, &signer, &digest(b"x")), "another manifest"),
    ];
    for (name, sign, cause) in cases {
        let module = format!("\0asm {name}");
        let manifest = node.registry.push(name, module.as_bytes());
        sign(&manifest);
        for wanted in [name, manifest.as_str()] {
            let error = refused(&node, &node.registry.image(wanted), PullPolicy::IfNotPresent).await;
            assert_eq!(error.reason(), "SignatureValidationFailed");
            assert!(error.to_string().contains(cause), "{error}");
        }
        assert_eq!(node.registry.hits(&digest(module.as_bytes())), 0, "{name}");
    }
}

#[tokio::test]
async fn one_good_signature_among_others_is_enough() {
    let (node, signer, _) = signed().await;
    let manifest = node.registry.push("both", b"\0asm both");
    node.registry.sign(&manifest, &Signer::new(2), &manifest);
    node.registry.sign(&manifest, &signer, &manifest);
    node.runtime.pull(&node.registry.image(&manifest), PullPolicy::IfNotPresent, &[]).await.unwrap();
}

#[tokio::test]
async fn a_cached_image_is_refused_when_its_key_is_trusted_no_longer() {
    let (node, _, manifest) = signed().await;
    let name = node.registry.image(&manifest);
    node.runtime.pull(&name, PullPolicy::IfNotPresent, &[]).await.unwrap();
    let new = Signer::new(2);
    let next = Node::again(node.directory.clone(), node.registry.clone(), trusting(&[&new]), Arc::new(NoCredentials));
    for policy in [PullPolicy::IfNotPresent, PullPolicy::Never, PullPolicy::Always] {
        assert_eq!(refused(&next, &name, policy).await.reason(), "SignatureValidationFailed");
    }
    // Signed with the new key as well, it is found to be good without another fetch of the module.
    next.registry.sign(&manifest, &new, &manifest);
    let fetched = next.registry.hits(&digest(MODULE));
    next.runtime.pull(&name, PullPolicy::IfNotPresent, &[]).await.unwrap();
    assert_eq!(next.registry.hits(&digest(MODULE)), fetched);
}

#[tokio::test]
async fn a_module_that_was_altered_in_the_registry_is_refused() {
    let (node, _, manifest) = signed().await;
    let mut altered = MODULE.to_vec();
    altered[10] ^= 1;
    node.registry.state(|state| state.blobs.insert(digest(MODULE), altered));
    for wanted in ["v1", manifest.as_str()] {
        let error = refused(&node, &node.registry.image(wanted), PullPolicy::IfNotPresent).await;
        assert_eq!(error.reason(), "ErrImagePull");
        assert!(error.to_string().contains("digest is"), "{error}");
    }
}

#[tokio::test]
async fn a_manifest_other_than_the_one_named_is_refused() {
    let (node, _, manifest) = signed().await;
    let other = node.registry.push("v2", b"\0asm other");
    node.registry.state(|state| {
        let other = state.manifests[&other].clone();
        state.manifests.insert(manifest.clone(), other)
    });
    let error = refused(&node, &node.registry.image(&manifest), PullPolicy::IfNotPresent).await;
    assert!(error.to_string().contains("not with the"), "{error}");
}

#[tokio::test]
async fn what_is_no_wasm_artifact_is_refused_by_name() {
    let node = Node::trusting_anyone().await;
    node.registry.push_manifest(
        "container",
        &json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(b""), "size": 0},
            "layers": []}),
    );
    let error = refused(&node, &node.registry.image("container"), PullPolicy::IfNotPresent).await;
    assert_eq!(error.reason(), "InvalidImage");
    assert!(error.is_permanent());
    assert!(error.to_string().contains("container image"), "{error}");
}

#[tokio::test]
async fn names_and_images_that_are_not_there_have_reasons_of_their_own() {
    let node = Node::trusting_anyone().await;
    let reason = async |name: &str, policy| refused(&node, name, policy).await.reason();
    assert_eq!(reason("Not A Name", PullPolicy::Always).await, "InvalidImageName");
    assert_eq!(reason(&node.registry.image("none"), PullPolicy::Never).await, "ErrImageNeverPull");
    assert_eq!(reason(&node.registry.image("none"), PullPolicy::Always).await, "ErrImagePull");
    assert_eq!(reason("127.0.0.1:1/app:v1", PullPolicy::Always).await, "ErrImagePull");
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_pulls_of_one_digest_are_one_pull() {
    let (node, _, manifest) = signed().await;
    for wanted in [manifest.as_str(), "v1"] {
        let name = node.registry.image(wanted);
        let pulls = (0..50).map(|_| node.runtime.pull(&name, PullPolicy::IfNotPresent, &[]));
        assert!(join_all(pulls).await.into_iter().all(|image| image.is_ok()));
        assert_eq!(node.registry.hits(&digest(MODULE)), 1);
    }
    assert_eq!(node.registry.hits(&manifest), 1);
}

#[tokio::test]
async fn pulls_by_tag_and_by_digest_of_one_manifest_never_wait_for_each_other() {
    let (node, _, manifest) = signed().await;
    let gate = Arc::new(Semaphore::new(0));
    node.registry.state(|state| state.gate = Some(gate.clone()));
    let by_tag: Vec<_> = (0..4)
        .map(|_| {
            let (runtime, name) = (node.runtime.clone(), node.registry.image("v1"));
            tokio::spawn(async move { runtime.pull(&name, PullPolicy::Always, &[]).await })
        })
        .collect();
    until("they have all places and wait for the manifest", || node.registry.hits("/manifests/v1") == 4).await;
    let name = node.registry.image(&manifest);
    let mut by_digest = pin!(node.runtime.pull(&name, PullPolicy::Always, &[]));
    assert!(futures::poll!(&mut by_digest).is_pending(), "it has the digest's lock and waits for a place");
    gate.add_permits(1000);
    let all = futures::future::join(join_all(by_tag), by_digest);
    let (by_tag, by_digest) = tokio::time::timeout(Duration::from_secs(10), all).await.expect("they wait for ever");
    by_digest.unwrap();
    for pulled in by_tag {
        assert_eq!(pulled.unwrap().unwrap().digest, manifest);
    }
}

#[tokio::test]
async fn a_damaged_copy_is_pulled_again() {
    let (node, _, manifest) = signed().await;
    let name = node.registry.image(&manifest);
    node.runtime.pull(&name, PullPolicy::IfNotPresent, &[]).await.unwrap();
    for content in [MODULE, &node.registry.state(|state| state.manifests[&manifest].clone())] {
        let path = node.directory.path().join("images/blobs").join(digest(content).trim_start_matches("sha256:"));
        let mut damaged = std::fs::read(&path).unwrap();
        damaged[3] ^= 1;
        std::fs::write(&path, damaged).unwrap();
        assert!(!node.runtime.pull(&name, PullPolicy::IfNotPresent, &[]).await.unwrap().cached);
        assert_eq!(std::fs::read(&path).unwrap(), content);
    }
}

#[tokio::test]
async fn answers_without_end_and_longer_than_announced_are_cut() {
    let (node, _, manifest) = signed().await;
    node.registry.state(|state| state.blobs.get_mut(&digest(MODULE)).unwrap().extend([0; 1000]));
    let error = refused(&node, &node.registry.image(&manifest), PullPolicy::IfNotPresent).await;
    assert!(error.to_string().contains("more than the"), "{error}");
    node.registry.state(|state| state.endless = true);
    let error = refused(&node, &node.registry.image("v1"), PullPolicy::IfNotPresent).await;
    assert!(error.to_string().contains("more than the"), "{error}");
}

struct OneSecret(RegistrySecret);

impl CredentialSource for OneSecret {
    fn credentials<'a>(&'a self, _registry: &'a str) -> BoxFuture<'a, Option<RegistrySecret>> {
        Box::pin(async { Some(self.0.clone()) })
    }
}

fn secret(registry: &Registry, password: &str) -> RegistrySecret {
    RegistrySecret { registry: registry.address.to_string(), username: "user".into(), password: password.into() }
}

#[tokio::test]
async fn secrets_of_the_pod_are_tried_before_the_nodes_and_no_token_is_left_for_the_next() {
    let node = Node::trusting_anyone().await;
    let manifest = node.registry.push("v1", MODULE);
    let name = node.registry.image("v1");
    node.registry.state(|state| state.login = Some(("user".into(), "right".into())));
    let error = refused(&node, &name, PullPolicy::Always).await;
    assert!(error.to_string().contains("anonymous"), "{error}");
    let wrong = [secret(&node.registry, "wrong")];
    let error = node.runtime.pull(&name, PullPolicy::Always, &wrong).await.unwrap_err();
    assert!(error.to_string().contains("\"user\""), "{error}");
    assert!(!error.to_string().contains("wrong"), "{error}");
    let secrets = [secret(&node.registry, "wrong"), secret(&node.registry, "right")];
    assert_eq!(node.runtime.pull(&name, PullPolicy::Always, &secrets).await.unwrap().digest, manifest);
    assert_eq!(refused(&node, &name, PullPolicy::Always).await.reason(), "ErrImagePull");
    let source = Arc::new(OneSecret(secret(&node.registry, "right")));
    let next = Node::again(node.directory.clone(), node.registry.clone(), Verification::AllowUnsigned, source);
    next.runtime.pull(&name, PullPolicy::Always, &wrong).await.unwrap();
}
