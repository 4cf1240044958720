//! From a name to a verified image: what is accepted, what is refused, and what is asked of the registry.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use common::{BUNDLE, Node, Registry, Signer, digest, limits, until};
use futures::future::{BoxFuture, join_all};
use krustlet_runtime::{
    CredentialSource, Login, NoCredentials, PullError, PullLimits, PullPolicy, RegistrySecret, Verification,
};
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
async fn keys_that_are_taken_while_the_node_runs_judge_what_is_on_it_already() {
    let (node, signer, manifest) = signed().await;
    let name = node.registry.image(&manifest);
    let pull = async |policy| node.runtime.pull(&name, policy, &[]).await;
    assert!(pull(PullPolicy::IfNotPresent).await.is_ok());
    let next = Signer::new(2);
    node.runtime.verify_by(trusting(&[&next]));
    for policy in [PullPolicy::Never, PullPolicy::IfNotPresent, PullPolicy::Always] {
        assert!(matches!(pull(policy).await, Err(PullError::Signature { .. })), "{policy:?}");
    }
    node.registry.sign(&manifest, &next, &manifest);
    assert!(pull(PullPolicy::IfNotPresent).await.is_ok());
    node.runtime.verify_by(trusting(&[&signer, &next]));
    assert!(pull(PullPolicy::Never).await.is_ok());
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
        ("other-key", &|manifest| node.registry.sign(manifest, &other, manifest), "by no key"),
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
    let login = Login::Password { username: "user".into(), password: password.into() };
    RegistrySecret { registry: registry.address.to_string(), login, source: None }
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

/// The same, as a pod brings it.
fn pods_secret(registry: &Registry, password: &str, source: &str) -> RegistrySecret {
    RegistrySecret { source: Some(source.to_owned()), ..secret(registry, password) }
}

/// A node, a registry that wants a login, and an image there that was pulled with it.
async fn private() -> (Node, RegistrySecret, String) {
    let node = Node::trusting_anyone().await;
    let manifest = node.registry.push("v1", MODULE);
    node.registry.state(|state| state.login = Some(("user".into(), "right".into())));
    let owner = pods_secret(&node.registry, "right", "shop/pull/1");
    let name = node.registry.image(&manifest);
    node.runtime.pull(&name, PullPolicy::IfNotPresent, std::slice::from_ref(&owner)).await.unwrap();
    (node, owner, name)
}

#[tokio::test]
async fn a_private_image_on_the_node_is_for_who_may_pull_it_and_nobody_else() {
    let (node, owner, name) = private().await;
    let wrong = pods_secret(&node.registry, "wrong", "other/pull/2");
    let elsewhere = RegistrySecret { registry: "other.example".into(), ..owner.clone() };
    for secrets in [vec![], vec![wrong.clone()], vec![elsewhere]] {
        for (policy, reason) in [(PullPolicy::IfNotPresent, "ErrImagePull"), (PullPolicy::Never, "ErrImageNeverPull")] {
            let error = node.runtime.pull(&name, policy, &secrets).await.unwrap_err();
            assert_eq!(error.reason(), reason, "{secrets:?}");
        }
    }
    // Whoever has the same login, or the Secret whose login it was, is not asked for again.
    let asked = node.registry.hits("/v2/");
    for known in [
        owner.clone(),
        pods_secret(&node.registry, "right", "other/pull/2"),
        pods_secret(&node.registry, "new", "shop/pull/1"),
    ] {
        for policy in [PullPolicy::IfNotPresent, PullPolicy::Never] {
            assert!(node.runtime.pull(&name, policy, &[wrong.clone(), known.clone()]).await.unwrap().cached);
        }
    }
    assert_eq!(node.registry.hits("/v2/"), asked);
}

#[tokio::test]
async fn who_may_use_an_image_is_known_after_a_restart_and_while_the_registry_is_away() {
    let (node, owner, name) = private().await;
    let again = Node::again(
        node.directory.clone(),
        node.registry.clone(),
        Verification::AllowUnsigned,
        Arc::new(NoCredentials),
    );
    again.registry.state(|state| state.down = true);
    assert!(again.runtime.pull(&name, PullPolicy::IfNotPresent, std::slice::from_ref(&owner)).await.unwrap().cached);
    assert_eq!(refused(&again, &name, PullPolicy::IfNotPresent).await.reason(), "ErrImagePull");
    again.registry.state(|state| state.down = false);
    assert_eq!(refused(&again, &name, PullPolicy::IfNotPresent).await.reason(), "ErrImagePull");
    // The registry opens the image to everybody: it is asked once, and the module is not fetched for that.
    again.registry.state(|state| state.login = None);
    let fetched = again.registry.hits(&digest(MODULE));
    assert!(again.runtime.pull(&name, PullPolicy::IfNotPresent, &[]).await.unwrap().cached);
    again.registry.state(|state| state.down = true);
    assert!(again.runtime.pull(&name, PullPolicy::Never, &[]).await.unwrap().cached);
    assert_eq!(again.registry.hits(&digest(MODULE)), fetched);
}

#[tokio::test]
async fn what_the_nodes_own_credentials_pulled_is_for_every_pod() {
    let (node, _, name) = private().await;
    let source = Arc::new(OneSecret(secret(&node.registry, "right")));
    let next = Node::again(node.directory.clone(), node.registry.clone(), Verification::AllowUnsigned, source);
    next.runtime.pull(&name, PullPolicy::IfNotPresent, &[]).await.unwrap();
    assert!(next.runtime.pull(&name, PullPolicy::Never, &[]).await.unwrap().cached);
}

/// To know a digest, or the manifest behind it, is no right to the module.
#[tokio::test]
async fn a_registry_that_names_anothers_private_image_has_to_bring_all_of_it() {
    let (node, _, name) = private().await;
    let other = Registry::start().await;
    let manifest = name.rsplit_once('@').unwrap().1;
    let next = Node::limited(
        node.directory.clone(),
        &[&node.registry, &other],
        Verification::AllowUnsigned,
        Arc::new(NoCredentials),
        limits(),
    );
    other.state(|state| {
        let content = node.registry.state(|state| state.manifests[manifest].clone());
        state.manifests.insert(manifest.to_owned(), content);
        let blobs = node.registry.state(|state| state.blobs.clone());
        state.blobs.extend(blobs.into_iter().filter(|(_, content)| content != MODULE));
    });
    for policy in [PullPolicy::IfNotPresent, PullPolicy::Always, PullPolicy::Never] {
        refused(&next, &other.image(manifest), policy).await;
    }
    other.push("v1", MODULE);
    next.runtime.pull(&other.image(manifest), PullPolicy::IfNotPresent, &[]).await.unwrap();
    refused(&next, &name, PullPolicy::IfNotPresent).await;
}

/// So many registries that trickle, and a pull from each under way.
async fn trickling(count: usize) -> Vec<Registry> {
    let mut registries = Vec::new();
    for _ in 0..count {
        let registry = Registry::start().await;
        registry.state(|state| state.trickle = Some(Duration::from_millis(20)));
        registries.push(registry);
    }
    registries
}

#[tokio::test]
async fn slow_registries_make_room_for_others_and_end() {
    let slow = trickling(8).await;
    let good = Registry::start().await;
    let manifest = good.push("v1", MODULE);
    let registries: Vec<_> = std::iter::once(&good).chain(&slow).collect();
    let limits =
        PullLimits { yields_after: Duration::from_millis(100), fails_after: Duration::from_secs(1), ..limits() };
    let directory = Arc::new(tempfile::tempdir().unwrap());
    let node = Node::limited(directory, &registries, Verification::AllowUnsigned, Arc::new(NoCredentials), limits);
    let held: Vec<_> = slow
        .iter()
        .map(|registry| {
            let (runtime, name) = (node.runtime.clone(), registry.image("v1"));
            tokio::spawn(async move { runtime.pull(&name, PullPolicy::Always, &[]).await })
        })
        .collect();
    until("all places are taken", || slow.iter().map(|registry| registry.hits("/manifests/")).sum::<usize>() >= 4)
        .await;
    let image = good.image(&manifest);
    let pulled = node.runtime.pull(&image, PullPolicy::Always, &[]);
    tokio::time::timeout(Duration::from_secs(10), pulled).await.expect("it waits for the slow ones").unwrap();
    for pull in held {
        let error = pull.await.unwrap().unwrap_err();
        assert!(error.reason() == "ErrImagePull" && error.to_string().contains("slow"), "{error}");
    }
}

#[tokio::test]
async fn one_registry_cannot_take_every_place() {
    let slow = trickling(1).await;
    let good = Registry::start().await;
    let manifest = good.push("v1", MODULE);
    let registries = [&good, &slow[0]];
    let limits = PullLimits { places_per_registry: 3, yields_after: Duration::from_secs(600), ..limits() };
    let directory = Arc::new(tempfile::tempdir().unwrap());
    let node = Node::limited(directory, &registries, Verification::AllowUnsigned, Arc::new(NoCredentials), limits);
    for number in 0..20 {
        let (runtime, name) = (node.runtime.clone(), slow[0].image(&format!("v{number}")));
        tokio::spawn(async move { runtime.pull(&name, PullPolicy::Always, &[]).await });
    }
    until("it has its places", || slow[0].hits("/manifests/") == 3).await;
    node.runtime.pull(&good.image(&manifest), PullPolicy::Always, &[]).await.unwrap();
    assert_eq!(slow[0].hits("/manifests/"), 3);
}

#[tokio::test]
async fn a_slow_registry_that_names_anothers_digest_holds_nobody_up() {
    let slow = trickling(1).await;
    let good = Registry::start().await;
    let manifest = good.push("v1", MODULE);
    let directory = Arc::new(tempfile::tempdir().unwrap());
    let node =
        Node::limited(directory, &[&good, &slow[0]], Verification::AllowUnsigned, Arc::new(NoCredentials), limits());
    let (runtime, name) = (node.runtime.clone(), slow[0].image(&manifest));
    tokio::spawn(async move { runtime.pull(&name, PullPolicy::Always, &[]).await });
    until("it is under way", || slow[0].hits("/manifests/") == 1).await;
    let image = good.image(&manifest);
    let pulled = node.runtime.pull(&image, PullPolicy::IfNotPresent, &[]);
    tokio::time::timeout(Duration::from_secs(5), pulled).await.expect("it waits for the slow one").unwrap();
}

/// Pushes an image whose manifest has some 200 KiB.
fn push_large(node: &Node, tag: &str) -> String {
    let manifest = node.registry.push(tag, MODULE);
    let mut document: serde_json::Value =
        node.registry.state(|state| serde_json::from_slice(&state.manifests[&manifest]).unwrap());
    document["annotations"] = json!({"padding": "x".repeat(200_000)});
    node.registry.push_manifest(tag, &document)
}

#[tokio::test]
async fn a_signature_is_asked_for_before_anything_large_is_read() {
    let (node, signer, _) = signed().await;
    let manifest = push_large(&node, "large");
    for wanted in ["large", manifest.as_str()] {
        let error = refused(&node, &node.registry.image(wanted), PullPolicy::Always).await;
        assert_eq!(error.reason(), "SignatureValidationFailed", "{error}");
    }
    assert_eq!(node.registry.hits("/blobs/"), 0);
    node.registry.sign(&manifest, &signer, &manifest);
    for wanted in ["large", manifest.as_str()] {
        assert_eq!(
            node.runtime.pull(&node.registry.image(wanted), PullPolicy::Always, &[]).await.unwrap().digest,
            manifest
        );
    }
}

#[tokio::test]
async fn bad_signatures_take_nothing_from_the_good_one_beside_them() {
    let (node, signer, _) = signed().await;
    let manifest = node.registry.push("beside", b"\0asm beside");
    let tag = format!("{}.sig", manifest.replace(':', "-"));
    node.registry.sign(&manifest, &signer, &manifest);
    let good: serde_json::Value = node.registry.state(|state| serde_json::from_slice(&state.manifests[&tag]).unwrap());
    let good = good["layers"][0].clone();
    let with = |key: &str, value: serde_json::Value| {
        let mut layer = good.clone();
        layer[key] = value;
        layer
    };
    // Nothing, what is not there, another size than it has, and what no signature is.
    let bad =
        [json!({}), with("digest", json!(digest(b"nowhere"))), with("size", json!(3)), with("annotations", json!({}))];
    for bad in bad {
        for layers in [json!([bad, good]), json!([good, bad])] {
            let directory = Arc::new(tempfile::tempdir().unwrap());
            let next = Node::again(directory, node.registry.clone(), trusting(&[&signer]), Arc::new(NoCredentials));
            next.registry.push_manifest(&tag, &json!({"schemaVersion": 2, "layers": layers}));
            next.runtime.pull(&next.registry.image(&manifest), PullPolicy::IfNotPresent, &[]).await.unwrap();
        }
        node.registry.push_manifest(&tag, &json!({"schemaVersion": 2, "layers": [bad]}));
        let error = refused(&node, &node.registry.image(&manifest), PullPolicy::IfNotPresent).await;
        assert_eq!(error.reason(), "SignatureValidationFailed", "{error}");
    }
}

#[tokio::test]
async fn a_bundle_among_the_referrers_is_enough_with_and_without_a_referrers_api() {
    let (node, signer, _) = signed().await;
    let by_tag = node.registry.push("by-tag", b"\0asm by-tag");
    let bundle = node.registry.push_bundle(&by_tag, &signer, &by_tag);
    node.registry.list_referrers(&by_tag, &[bundle]);
    node.runtime.pull(&node.registry.image(&by_tag), PullPolicy::IfNotPresent, &[]).await.unwrap();
    let by_api = node.registry.push("by-api", b"\0asm by-api");
    let bundle = node.registry.push_bundle(&by_api, &signer, &by_api);
    let page = json!({"manifests": [{"digest": bundle}]}).to_string().into_bytes();
    // The first page lists nothing of use, and its link is relative as registries write it.
    let next = format!("/v2/app/referrers/{by_api}?last=x");
    let first = (br#"{"manifests": [{"digest": "sha256:0"}]}"#.to_vec(), Some(next));
    let pages = [(by_api.clone(), first), (format!("{by_api}?last=x"), (page, None))];
    node.registry.state(|state| state.referrers = Some(pages.into()));
    node.runtime.pull(&node.registry.image(&by_api), PullPolicy::IfNotPresent, &[]).await.unwrap();
    // What was found is kept, and checked again from there.
    node.registry.state(|state| state.down = true);
    for manifest in [&by_tag, &by_api] {
        node.runtime.pull(&node.registry.image(manifest), PullPolicy::IfNotPresent, &[]).await.unwrap();
    }
    let other = trusting(&[&Signer::new(2)]);
    let next = Node::again(node.directory.clone(), node.registry.clone(), other, Arc::new(NoCredentials));
    let error = refused(&next, &next.registry.image(&by_tag), PullPolicy::Never).await;
    assert!(error.to_string().contains("by no key"), "{error}");
}

/// A bad referrer, and what is said of it.
type BadReferrer<'a> = (&'a str, &'a dyn Fn(&str) -> String);

#[tokio::test]
async fn a_bad_referrer_has_its_reason_and_takes_nothing_from_the_good_one_beside_it() {
    let (node, signer, another) = signed().await;
    let (registry, other) = (&node.registry, Signer::new(2));
    let changed = |manifest: &str, pointer: &str, value: serde_json::Value| {
        registry.push_referrer(manifest, &signer.bundle(manifest), |document| {
            *document.pointer_mut(pointer).unwrap() = value;
        })
    };
    let bad: [BadReferrer; 11] = [
        ("by no key", &|manifest| registry.push_bundle(manifest, &other, manifest)),
        ("for another manifest, sha256:", &|manifest| registry.push_bundle(manifest, &signer, &another)),
        ("refers to another manifest", &|manifest| registry.push_bundle(&another, &signer, manifest)),
        ("layer type \"text/plain\"", &|manifest| changed(manifest, "/layers/0/mediaType", json!("text/plain"))),
        ("artifact type \"text/plain\"", &|manifest| changed(manifest, "/artifactType", json!("text/plain"))),
        ("2 layers", &|manifest| {
            let layer = json!({"mediaType": BUNDLE, "digest": digest(b"x"), "size": 1});
            changed(manifest, "/layers", json!([layer, layer]))
        }),
        ("bundle sha256:", &|manifest| changed(manifest, "/layers/0/size", json!(3))),
        ("cannot be read", &|manifest| changed(manifest, "/layers/0/digest", json!(digest(b"nowhere")))),
        ("more than the 262144", &|manifest| changed(manifest, "/layers/0/size", json!(1 << 30))),
        ("malformed", &|manifest| {
            let whole = signer.bundle(manifest).to_string();
            let cut = json!(&whole[..whole.len() / 2]);
            registry.push_referrer(manifest, &cut, |_| {})
        }),
        ("cannot be read", &|_| digest(b"nowhere")),
    ];
    for (number, (reason, make)) in bad.iter().enumerate() {
        let manifest = registry.push("bad", format!("\0asm bad {number}").as_bytes());
        let (bad, good) = (make(&manifest), registry.push_bundle(&manifest, &signer, &manifest));
        registry.list_referrers(&manifest, std::slice::from_ref(&bad));
        let error = refused(&node, &registry.image(&manifest), PullPolicy::IfNotPresent).await;
        assert_eq!(error.reason(), "SignatureValidationFailed", "{error}");
        assert!(error.to_string().contains(reason), "{reason}: {error}");
        assert!(error.to_string().ends_with(&format!("{}`", registry.image(&manifest))), "{error}");
        registry.list_referrers(&manifest, &[bad, good]);
        node.runtime.pull(&registry.image(&manifest), PullPolicy::IfNotPresent, &[]).await.unwrap();
    }
}

#[tokio::test]
async fn one_format_that_is_broken_takes_nothing_from_the_other() {
    let (node, signer, _) = signed().await;
    let registry = &node.registry;
    let broken = [b"no JSON".to_vec(), vec![b' '; 2 << 20], br#"{"manifests": 7, "layers": {}}"#.to_vec()];
    for (number, broken) in broken.into_iter().enumerate() {
        let manifest = registry.push("broken", format!("\0asm broken {number}").as_bytes());
        let bundle = registry.push_bundle(&manifest, &signer, &manifest);
        let (tag, list) = (format!("{}.sig", manifest.replace(':', "-")), manifest.replace(':', "-"));
        registry.state(|state| {
            state.manifests.insert(tag.clone(), broken.clone());
            state.manifests.insert(list.clone(), broken.clone());
        });
        let error = refused(&node, &registry.image(&manifest), PullPolicy::IfNotPresent).await.to_string();
        assert!(error.contains(&format!("its tag {tag}")) && error.contains("list of referrers"), "{error}");
        registry.list_referrers(&manifest, &[bundle]);
        node.runtime.pull(&registry.image(&manifest), PullPolicy::IfNotPresent, &[]).await.unwrap();
        let manifest = registry.push("broken", format!("\0asm signed {number}").as_bytes());
        registry.state(|state| state.manifests.insert(manifest.replace(':', "-"), broken));
        registry.sign(&manifest, &signer, &manifest);
        node.runtime.pull(&registry.image(&manifest), PullPolicy::IfNotPresent, &[]).await.unwrap();
    }
}

#[tokio::test]
async fn referrers_without_end_are_looked_at_up_to_a_bound_and_no_link_leads_elsewhere() {
    let (node, signer, manifest) = signed().await;
    let (registry, elsewhere) = (&node.registry, Registry::start().await);
    let many: Vec<String> =
        (0..500).map(|number| registry.push_bundle(&number.to_string(), &signer, &manifest)).collect();
    let image = registry.push("many", b"\0asm many");
    registry.list_referrers(&image, &[many.clone(), vec![registry.push_bundle(&image, &signer, &image)]].concat());
    let error = refused(&node, &registry.image(&image), PullPolicy::IfNotPresent).await.to_string();
    assert!(error.contains("of its 501 referrers the first 32 were looked at") && error.len() < 2000, "{error}");
    assert_eq!(many.iter().map(|referrer| registry.hits(referrer)).sum::<usize>(), 32);
    // A page that names itself as the next one, one of another host's, and one of another repository's.
    for link in [
        format!("/v2/app/referrers/{image}"),
        format!("http://{}/v2/app/referrers/x", elsewhere.address),
        "/v2/other/referrers/x".into(),
    ] {
        let page = (br#"{"manifests": []}"#.to_vec(), Some(link));
        registry.state(|state| state.referrers = Some([(image.clone(), page)].into()));
        let error = refused(&node, &registry.image(&image), PullPolicy::IfNotPresent).await.to_string();
        assert!(error.contains("it is not signed"), "{error}");
    }
    assert_eq!((elsewhere.hits("/"), registry.hits("/v2/other")), (0, 0));
}

#[tokio::test]
async fn credentials_do_not_follow_a_redirect_to_another_host() {
    let (node, owner, _) = private().await;
    let store = Registry::start().await;
    let module = b"\0asm elsewhere";
    let manifest = node.registry.push("v2", module);
    store.push("v2", module);
    node.registry.state(|state| state.blobs_at = Some(format!("http://{}", store.address)));
    let name = node.registry.image(&manifest);
    node.runtime.pull(&name, PullPolicy::IfNotPresent, &[owner]).await.unwrap();
    assert_eq!(store.hits(&digest(module)), 1);
    store.state(|state| assert!(state.brought.iter().all(|(_, authorization)| authorization.is_none())));
    let asked = node.registry.state(|state| state.brought.clone());
    assert!(
        asked.iter().any(|(path, brought)| path.contains("/blobs/") && brought.as_deref() == Some("Bearer ticket"))
    );
    // A circle ends.
    node.registry.state(|state| state.blobs_at = Some(format!("http://{}", node.registry.address)));
    let again = node.registry.push("v3", b"\0asm in a circle");
    let owner = pods_secret(&node.registry, "right", "shop/pull/1");
    let error = node.runtime.pull(&node.registry.image(&again), PullPolicy::Always, &[owner]).await.unwrap_err();
    assert!(error.to_string().contains("redirects more than"), "{error}");
}

#[tokio::test]
async fn tokens_in_place_of_a_password_are_used() {
    let node = Node::trusting_anyone().await;
    let manifest = node.registry.push("v1", MODULE);
    node.registry.state(|state| state.login = Some(("user".into(), "refresh".into())));
    for login in [Login::IdentityToken("refresh".into()), Login::RegistryToken("ticket".into())] {
        let secret = RegistrySecret { login, ..pods_secret(&node.registry, "", "shop/pull/1") };
        node.runtime.pull(&node.registry.image(&manifest), PullPolicy::Always, &[secret]).await.unwrap();
    }
    node.registry.state(|state| {
        assert!(
            state.forms[0].contains("grant_type=refresh_token")
                && state.forms[0].contains("scope=repository%3Aapp%3Apull")
        );
        assert_eq!(state.forms.len(), 1, "a registry token needs no token service");
    });
}

#[tokio::test]
async fn a_secret_of_many_logins_is_tried_a_bounded_number_of_times() {
    let node = Node::trusting_anyone().await;
    node.registry.push("v1", MODULE);
    node.registry.state(|state| state.login = Some(("user".into(), "right".into())));
    let secrets: Vec<_> = (0..500).map(|number| secret(&node.registry, &format!("wrong-{number}"))).collect();
    node.runtime.pull(&node.registry.image("v1"), PullPolicy::Always, &secrets).await.unwrap_err();
    assert!(node.registry.hits("/token") <= 20, "{}", node.registry.hits("/token"));
}

#[tokio::test]
async fn a_container_image_is_refused_with_its_platform_and_the_command_that_helps() {
    let (node, _, _) = signed().await;
    let config = json!({"os": "linux", "architecture": "arm64", "rootfs": {}}).to_string();
    node.registry.state(|state| state.blobs.insert(digest(config.as_bytes()), config.clone().into_bytes()));
    node.registry.push_manifest(
        "container",
        &json!({"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": digest(config.as_bytes()),
                "size": config.len()},
            "layers": []}),
    );
    let error = refused(&node, &node.registry.image("container"), PullPolicy::IfNotPresent).await;
    assert_eq!(error.reason(), "InvalidImage");
    let command = format!("`wkg oci push {} app.wasm`", node.registry.image("container"));
    for part in ["container image", "linux/arm64", command.as_str()] {
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[tokio::test]
async fn blobs_shorter_than_announced_are_refused_and_leave_nothing() {
    let (node, _, manifest) = signed().await;
    node.registry.state(|state| state.blobs.get_mut(&digest(MODULE)).unwrap().truncate(5));
    let error = refused(&node, &node.registry.image(&manifest), PullPolicy::IfNotPresent).await;
    assert!(error.to_string().contains("ended after 5 bytes"), "{error}");
    assert_eq!(std::fs::read_dir(node.directory.path().join("images/tmp")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_disk_that_takes_nothing_is_told_and_tried_again() {
    let (node, _, manifest) = signed().await;
    let name = node.registry.image(&manifest);
    let temporary = node.directory.path().join("images/tmp");
    std::fs::remove_dir(&temporary).unwrap();
    let error = refused(&node, &name, PullPolicy::IfNotPresent).await;
    assert!(error.reason() == "ErrImagePull" && !error.is_permanent(), "{error}");
    assert!(error.to_string().contains("failed to store it"), "{error}");
    std::fs::create_dir(&temporary).unwrap();
    node.runtime.pull(&name, PullPolicy::IfNotPresent, &[]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_share_a_module_are_pulled_at_once() {
    let node = Node::trusting_anyone().await;
    let first = node.registry.push("one", MODULE);
    let mut document: serde_json::Value =
        node.registry.state(|state| serde_json::from_slice(&state.manifests[&first]).unwrap());
    let mut names = vec![node.registry.image(&first)];
    for number in 0..8 {
        document["annotations"] = json!({"number": number.to_string()});
        names.push(node.registry.image(&node.registry.push_manifest("more", &document)));
    }
    let pulls = names.iter().map(|name| node.runtime.pull(name, PullPolicy::IfNotPresent, &[]));
    assert!(join_all(pulls).await.into_iter().all(|image| image.is_ok_and(|image| image.layer == digest(MODULE))));
}

#[tokio::test]
async fn a_registry_on_this_machine_is_asked_only_when_the_operator_named_it() {
    let node = Node::trusting_anyone().await;
    let other = Registry::start().await;
    other.push("v1", MODULE);
    for host in [other.address.to_string(), format!("localhost:{}", other.address.port())] {
        let error = refused(&node, &format!("{host}/app:v1"), PullPolicy::Always).await;
        assert!(error.to_string().contains("--trusted-registries"), "{error}");
    }
    assert_eq!(other.hits("/"), 0);
}
