//! Sigstore bundles, as cosign 3 signs with a key: a manifest that refers to the signed one, and in its layer a DSSE envelope
//! around an in-toto statement about that one's digest.
//!
//! What a registry lists as referrers is a hint where to look: each is judged by its own manifest. See the bundle's format in
//! sigstore/protobuf-specs, the envelope's in secure-systems-lab/dsse, and `signDigestBundle` in sigstore/cosign.

use crate::artifact::{Descriptor, Digest, MANIFEST_TYPE, RawDescriptor, cut, shown};
use crate::public_key::{PublicKey, der, is_signed_by};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use std::collections::BTreeMap;

pub const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
/// How it may be written inside of the bundle.
const BUNDLE_WITH_PARAMETER: &str = "application/vnd.dev.sigstore.bundle+json;version=0.3";
const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";
/// Of cosign 2's attestations.
const FORMER_STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v0.1";
/// What makes a statement a signature; others are attestations, which say something about the image and not to run it.
const PREDICATE_TYPE: &str = "https://sigstore.dev/cosign/sign/v1";

/// One that a key made has a kilobyte; certificates, log entries and time stamps are some more.
pub const MAX_BUNDLE: u64 = 256 * 1024;
pub const MAX_REFERRER: u64 = 64 * 1024;
/// Referrers beyond this many are not looked at.
pub const MAX_REFERRERS: usize = 32;
/// Of one page of the list.
pub const MAX_INDEX: u64 = 1024 * 1024;
pub const MAX_PAGES: usize = 4;

/// A referrer as an index lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub digest: Digest,
    /// By the index's word, which decides no more than what is looked at first.
    pub is_bundle: bool,
}

/// Reads an index of referrers. Entries that can be none are passed over.
pub fn listed(index: &[u8]) -> Result<Vec<Listed>, String> {
    #[derive(Deserialize)]
    struct Index {
        manifests: Vec<serde_json::Value>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|error| cut(&error))?;
    let entry = |entry: serde_json::Value| {
        let digest = Digest::parse(entry.get("digest")?.as_str()?).ok()?;
        let is_bundle = entry.get("artifactType").is_some_and(|found| found == BUNDLE);
        Some(Listed { digest, is_bundle })
    };
    Ok(index.manifests.into_iter().filter_map(entry).collect())
}

/// The bundle that a referrer of `subject` consists of.
pub fn layer(manifest: &[u8], subject: &Digest) -> Result<Descriptor, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Manifest {
        media_type: Option<String>,
        artifact_type: Option<String>,
        config: Typed,
        layers: Vec<RawDescriptor>,
        subject: Option<Subject>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Typed {
        media_type: String,
    }
    #[derive(Deserialize)]
    struct Subject {
        digest: String,
    }
    let manifest: Manifest =
        serde_json::from_slice(manifest).map_err(|error| format!("is no OCI manifest: {}", cut(&error)))?;
    let media_type = manifest.media_type.as_deref().unwrap_or(MANIFEST_TYPE);
    if media_type != MANIFEST_TYPE {
        return Err(format!("has manifest type {:?}, expected {MANIFEST_TYPE}", shown(media_type)));
    }
    let artifact_type = manifest.artifact_type.unwrap_or(manifest.config.media_type);
    if artifact_type != BUNDLE {
        return Err(format!("has artifact type {:?}, expected {BUNDLE}", shown(&artifact_type)));
    }
    match &manifest.subject {
        Some(found) if found.digest == subject.as_str() => {}
        Some(found) => return Err(format!("refers to another manifest, {:?}", shown(&found.digest))),
        None => return Err("refers to no manifest".into()),
    }
    let [layer] = manifest.layers.as_slice() else {
        return Err(format!("has {} layers, expected exactly one of type {BUNDLE}", manifest.layers.len()));
    };
    if layer.media_type != BUNDLE {
        return Err(format!("has layer type {:?}, expected {BUNDLE}", shown(&layer.media_type)));
    }
    layer.checked("bundle", MAX_BUNDLE).map_err(|refused| refused.to_string())
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bundle {
    media_type: String,
    verification_material: Option<Material>,
    dsse_envelope: Option<Envelope>,
}

/// The hint of a public key is nobody's word; each key that is trusted is tried.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Material {
    public_key: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<EnvelopeSignature>,
}

#[derive(Deserialize)]
struct EnvelopeSignature {
    sig: String,
}

/// An in-toto statement, by a key that is trusted.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Statement {
    #[serde(rename = "_type")]
    kind: String,
    subject: Vec<StatementSubject>,
    pub predicate_type: String,
    #[serde(default)]
    pub predicate: serde_json::Value,
}

#[derive(Deserialize)]
struct StatementSubject {
    digest: BTreeMap<String, String>,
}

/// Checks that one of `keys` signed `manifest` by this bundle.
pub fn verify(bundle: &[u8], manifest: &Digest, keys: &[PublicKey]) -> Result<(), String> {
    let statement = statement(bundle, keys)?;
    if statement.kind != STATEMENT_TYPE {
        return Err(statement.of_another_kind());
    }
    if statement.predicate_type != PREDICATE_TYPE {
        let found = shown(&statement.predicate_type);
        return Err(format!("is an attestation of type {found:?} and no signature, {PREDICATE_TYPE}"));
    }
    statement.is_about(manifest)
}

/// What one of `keys` says by this bundle.
pub fn statement(bundle: &[u8], keys: &[PublicKey]) -> Result<Statement, String> {
    if bundle.len() as u64 > MAX_BUNDLE {
        return Err(format!("has {} bytes, more than the {MAX_BUNDLE} allowed", bundle.len()));
    }
    let bundle: Bundle =
        serde_json::from_slice(bundle).map_err(|error| format!("is malformed: no Sigstore bundle: {}", cut(&error)))?;
    if bundle.media_type != BUNDLE && bundle.media_type != BUNDLE_WITH_PARAMETER {
        return Err(format!("has bundle type {:?}, expected {BUNDLE}", shown(&bundle.media_type)));
    }
    let Some(envelope) = bundle.dsse_envelope else { return Err("holds no DSSE envelope".into()) };
    if bundle.verification_material.is_none_or(|material| material.public_key.is_none()) {
        return Err("was not made with a key (cosign sign --key), and this node trusts keys only".into());
    }
    envelope.statement(keys)
}

/// What one of `keys` says by a DSSE envelope alone.
pub fn enveloped(envelope: &[u8], keys: &[PublicKey]) -> Result<Statement, String> {
    if envelope.len() as u64 > MAX_BUNDLE {
        return Err(format!("has {} bytes, more than the {MAX_BUNDLE} allowed", envelope.len()));
    }
    let envelope: Envelope =
        serde_json::from_slice(envelope).map_err(|error| format!("is malformed: no DSSE envelope: {}", cut(&error)))?;
    envelope.statement(keys)
}

impl Envelope {
    fn statement(self, keys: &[PublicKey]) -> Result<Statement, String> {
        let [signature] = self.signatures.as_slice() else {
            return Err(format!("has {} signatures, expected exactly one", self.signatures.len()));
        };
        if self.payload_type != PAYLOAD_TYPE {
            return Err(format!("has payload type {:?}, expected {PAYLOAD_TYPE}", shown(&self.payload_type)));
        }
        let signature = der(&signature.sig).map_err(|error| format!("is malformed: {error}"))?;
        let payload =
            BASE64.decode(&self.payload).map_err(|error| format!("is malformed: its payload is no base64: {error}"))?;
        if !is_signed_by(keys, &pre_authentication_encoding(&self.payload_type, &payload), &signature) {
            return Err("was made by no key that this node trusts, or altered".into());
        }
        let statement: Statement = serde_json::from_slice(&payload)
            .map_err(|error| format!("is malformed: no in-toto statement: {}", cut(&error)))?;
        match statement.kind.as_str() {
            STATEMENT_TYPE | FORMER_STATEMENT_TYPE => Ok(statement),
            _ => Err(statement.of_another_kind()),
        }
    }
}

impl Statement {
    fn of_another_kind(&self) -> String {
        format!("has statement type {:?}, expected {STATEMENT_TYPE}", shown(&self.kind))
    }

    pub fn is_about(&self, manifest: &Digest) -> Result<(), String> {
        let mut digests = self.subject.iter().filter_map(|subject| subject.digest.get("sha256"));
        if digests.clone().any(|digest| digest == manifest.hex()) {
            return Ok(());
        }
        let found = digests
            .next()
            .map_or_else(|| "without a sha256 digest".to_owned(), |digest| format!("sha256:{}", shown(digest)));
        Err(format!("is for another manifest, {found}"))
    }
}

/// DSSE's PAE: what is signed.
fn pre_authentication_encoding(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut encoded = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len()).into_bytes();
    encoded.extend_from_slice(payload);
    encoded
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::{Random, Signer, cases};
    use serde_json::{Value, json};

    fn manifest() -> Digest {
        Digest::of(b"manifest")
    }

    fn statement() -> Value {
        json!({"_type": STATEMENT_TYPE, "subject": [{"digest": {"sha256": manifest().hex()}}],
            "predicateType": PREDICATE_TYPE, "predicate": {}})
    }

    fn bundle() -> Value {
        Signer::new(1).bundle(PAYLOAD_TYPE, statement().to_string().as_bytes())
    }

    fn checked(bundle: &Value) -> Result<(), String> {
        verify(bundle.to_string().as_bytes(), &manifest(), &[Signer::new(1).public_key()])
    }

    /// The document with each of these parts in another's place, or without it.
    fn altered(document: &Value, changes: &[(&str, Value)]) -> Vec<(String, Value)> {
        let change = |(pointer, value): &(&str, Value)| {
            let mut document = document.clone();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            let parent = document.pointer_mut(parent).unwrap();
            match (value, parent) {
                (Value::Null, Value::Object(object)) => drop(object.remove(key).unwrap()),
                (value, parent) => *parent.pointer_mut(&format!("/{key}")).unwrap() = value.clone(),
            }
            (format!("{pointer} {value}"), document)
        };
        changes.iter().map(change).collect()
    }

    #[test]
    fn the_encoding_is_that_of_dsses_specification() {
        let encoded = pre_authentication_encoding("http://example.com/HelloWorld", b"hello world");
        assert_eq!(encoded, b"DSSEv1 29 http://example.com/HelloWorld 11 hello world");
        assert_eq!(pre_authentication_encoding("", "é".as_bytes()), "DSSEv1 0  2 é".as_bytes());
    }

    #[test]
    fn a_bundle_by_a_trusted_key_is_accepted_among_several_keys_and_subjects() {
        checked(&bundle()).unwrap();
        let mut several = statement();
        several["subject"].as_array_mut().unwrap().insert(0, json!({"name": "other", "digest": {"sha512": "00"}}));
        let signed = Signer::new(1).bundle(PAYLOAD_TYPE, several.to_string().as_bytes());
        let keys = [Signer::new(2).public_key(), Signer::new(1).public_key()];
        verify(signed.to_string().as_bytes(), &manifest(), &keys).unwrap();
    }

    /// Key and bundle are as cosign 3.1.3 made them (`sign --key`, without a log).
    #[test]
    fn what_cosign_3_itself_signed_is_accepted() {
        let key = PublicKey::from_pem(
            "-----BEGIN PUBLIC KEY-----\n\
             MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAESL1r0ZusdhdEKZQrOus3/YIA9hyK\n\
             ypTVyjeqLK2KvvMgYhenQkJlAI8wzJ8YGZbYLhFzVNp6Cm1C6Gqhg2yIkg==\n\
             -----END PUBLIC KEY-----\n",
        )
        .unwrap();
        let signed = "sha256:80e8b9f2f2408703ebb2280414b369fc10351ce1b7ea76deb86a65c7c7b4ffb3";
        let bundle = concat!(
            r#"{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json", "verificationMaterial":{"publicKey":"#,
            r#"{"hint":"qeA3heEYdlWWHe3QsLN25pUWaa+typluKEqLRkW2p1E="}}, "dsseEnvelope":{"payload":"#,
            r#""eyJfdHlwZSI6Imh0dHBzOi8vaW4tdG90by5pby9TdGF0ZW1lbnQvdjEiLCAic3ViamVjdCI6W3siZGlnZXN0Ijp7InNoYTI1NiI6IjgwZTh"#,
            r#"iOWYyZjI0MDg3MDNlYmIyMjgwNDE0YjM2OWZjMTAzNTFjZTFiN2VhNzZkZWI4NmE2NWM3YzdiNGZmYjMifSwgImFubm90YXRpb25zIjp7fX1"#,
            r#"dLCAicHJlZGljYXRlVHlwZSI6Imh0dHBzOi8vc2lnc3RvcmUuZGV2L2Nvc2lnbi9zaWduL3YxIiwgInByZWRpY2F0ZSI6e319", "#,
            r#""payloadType":"application/vnd.in-toto+json", "signatures":[{"sig":"#,
            r#""MEQCIChSVJiFHf4FfkxkJ187Fabfz54GroZKPPfXYYmp6ycYAiAuczlJ7jo/NTNerR8osx4WQrCIWQMvRk3hQaeFZVfMtg=="}]}}"#,
        );
        verify(bundle.as_bytes(), &Digest::parse(signed).unwrap(), &[key]).unwrap();
    }

    /// The space of alterations: each field of the bundle, without it, and with what else might stand there.
    #[test]
    fn every_field_that_is_altered_is_refused_with_its_reason() {
        let (good, two) = (bundle(), json!([{"sig": "c2ln"}, {"sig": "c2ln"}]));
        let other = Signer::new(2).bundle(PAYLOAD_TYPE, statement().to_string().as_bytes());
        let (payload, sig) = ("/dsseEnvelope/payload", "/dsseEnvelope/signatures/0/sig");
        for (reason, changes) in [
            ("malformed", vec![("/mediaType", json!(null)), ("/mediaType", json!(7)), ("/dsseEnvelope", json!(7))]),
            (
                "bundle type",
                vec![("/mediaType", json!("application/vnd.dev.sigstore.bundle.v0.2+json")), ("/mediaType", json!(""))],
            ),
            ("no DSSE envelope", vec![("/dsseEnvelope", json!(null))]),
            (
                "keys only",
                vec![
                    ("/verificationMaterial", json!(null)),
                    ("/verificationMaterial/publicKey", json!(null)),
                    ("/verificationMaterial", json!({"certificate": {"rawBytes": "AA=="}})),
                ],
            ),
            ("signatures, expected", vec![("/dsseEnvelope/signatures", json!([])), ("/dsseEnvelope/signatures", two)]),
            (
                "payload type",
                vec![
                    ("/dsseEnvelope/payloadType", json!("application/json")),
                    ("/dsseEnvelope/payloadType", json!("")),
                ],
            ),
            (
                "malformed",
                vec![
                    ("/dsseEnvelope/payloadType", json!(null)),
                    ("/dsseEnvelope/signatures", json!(null)),
                    ("/dsseEnvelope/signatures/0", json!({})),
                    (payload, json!(null)),
                    (payload, json!("no base64!")),
                    (sig, json!(null)),
                    (sig, json!("")),
                    (sig, json!("c2ln")),
                    (sig, json!("A".repeat(1000))),
                ],
            ),
            (
                "no key",
                vec![
                    (payload, json!(BASE64.encode(statement().to_string().replace("sign/v1", "sign/v2")))),
                    (payload, json!("")),
                    (sig, other["dsseEnvelope"]["signatures"][0]["sig"].clone()),
                ],
            ),
        ] {
            for (what, document) in altered(&good, &changes) {
                let error = checked(&document).unwrap_err();
                assert!(error.contains(reason), "{what}: {error}");
            }
        }
        let error = checked(&other).unwrap_err();
        assert!(error.contains("no key"), "{error}");
        assert!(verify(b"{", &manifest(), &[]).unwrap_err().contains("malformed"));
        assert!(verify(&vec![b' '; 300 * 1024], &manifest(), &[]).unwrap_err().contains("more than"));
    }

    /// What the trusted key itself signed, and is no signature of this manifest.
    #[test]
    fn a_signed_statement_of_another_kind_is_refused_with_its_reason() {
        let signer = Signer::new(1);
        for (reason, changes) in [
            ("statement type", vec![("/_type", json!("https://in-toto.io/Statement/v0.1")), ("/_type", json!(""))]),
            (
                "attestation",
                vec![("/predicateType", json!("https://slsa.dev/provenance/v1")), ("/predicateType", json!(""))],
            ),
            (
                "another manifest",
                vec![
                    ("/subject", json!([])),
                    ("/subject/0/digest", json!({})),
                    ("/subject/0/digest/sha256", json!(Digest::of(b"x").hex())),
                    ("/subject/0/digest/sha256", json!(manifest().as_str())),
                    ("/subject/0/digest", json!({"sha512": manifest().hex()})),
                ],
            ),
            (
                "malformed",
                vec![
                    ("/_type", json!(null)),
                    ("/predicateType", json!(null)),
                    ("/subject", json!(null)),
                    ("/subject/0/digest", json!(null)),
                ],
            ),
        ] {
            for (what, document) in altered(&statement(), &changes) {
                let error = checked(&signer.bundle(PAYLOAD_TYPE, document.to_string().as_bytes())).unwrap_err();
                assert!(error.contains(reason), "{what}: {error}");
            }
        }
        // What it signed under another type: a simple-signing payload's signature is none of an envelope either.
        let error = checked(&signer.bundle("text/plain", statement().to_string().as_bytes())).unwrap_err();
        assert!(error.contains("payload type"), "{error}");
        let mut bare = bundle();
        bare["dsseEnvelope"]["signatures"][0]["sig"] = json!(signer.signature(statement().to_string().as_bytes()));
        assert!(checked(&bare).unwrap_err().contains("no key"));
    }

    #[test]
    fn bundles_of_any_bytes_are_refused_without_a_panic() {
        let good = bundle();
        let bytes = good.to_string().into_bytes();
        let mut random = Random::new(5);
        cases(3_000, || {
            let mutated = random.mutate(&bytes);
            let _ = listed(&mutated);
            let _ = layer(&mutated, &manifest());
            if verify(&mutated, &manifest(), &[Signer::new(1).public_key()]).is_ok() {
                let envelope = serde_json::from_slice::<Bundle>(&mutated).unwrap().dsse_envelope.unwrap();
                assert_eq!(good["dsseEnvelope"]["payload"], envelope.payload);
                assert_eq!(good["dsseEnvelope"]["payloadType"], envelope.payload_type);
            }
        });
    }

    #[test]
    fn a_referrer_is_judged_by_its_own_manifest() {
        let good = json!({"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": BUNDLE,
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": Digest::of(b"{}").as_str(), "size": 2},
            "layers": [{"mediaType": BUNDLE, "digest": Digest::of(b"bundle").as_str(), "size": 6}],
            "subject": {"mediaType": MANIFEST_TYPE, "digest": manifest().as_str(), "size": 7}});
        let read = |document: &Value| layer(document.to_string().as_bytes(), &manifest());
        assert_eq!(read(&good).unwrap(), Descriptor { digest: Digest::of(b"bundle"), size: 6 });
        let mut by_config = altered(&good, &[("/artifactType", json!(null))]).remove(0).1;
        by_config["config"]["mediaType"] = json!(BUNDLE);
        read(&by_config).unwrap();
        let layer = good["layers"][0].clone();
        for (reason, changes) in [
            (
                "no OCI manifest",
                vec![
                    ("/layers", json!(null)),
                    ("/config", json!(null)),
                    ("/subject", json!(7)),
                    ("/layers/0", json!({})),
                ],
            ),
            ("manifest type", vec![("/mediaType", json!("application/vnd.oci.image.index.v1+json"))]),
            ("artifact type", vec![("/artifactType", json!(null)), ("/artifactType", json!("text/plain"))]),
            (
                "refers to another manifest",
                vec![("/subject/digest", json!(Digest::of(b"x").as_str())), ("/subject/digest", json!(""))],
            ),
            ("refers to no manifest", vec![("/subject", json!(null))]),
            ("layers, expected", vec![("/layers", json!([])), ("/layers", json!([layer, layer]))]),
            (
                "layer type",
                vec![
                    ("/layers/0/mediaType", json!("application/json")),
                    ("/layers/0/mediaType", json!("application/vnd.dev.sigstore.bundle.v0.1+json")),
                ],
            ),
            ("more than", vec![("/layers/0/size", json!(MAX_BUNDLE + 1))]),
            ("sha256", vec![("/layers/0/digest", json!("sha512:00"))]),
        ] {
            for (what, document) in altered(&good, &changes) {
                let error = read(&document).unwrap_err();
                assert!(error.contains(reason), "{what}: {error}");
            }
        }
    }

    #[test]
    fn what_is_no_entry_takes_nothing_from_the_others_of_an_index() {
        let good = json!({"digest": manifest().as_str(), "artifactType": "whatever", "size": "large", "mediaType": 7});
        for bad in [json!(null), json!(7), json!({}), json!({"digest": 7}), json!({"digest": "sha512:00"})] {
            let index = json!({"manifests": [bad, good, bad]});
            assert_eq!(
                listed(index.to_string().as_bytes()).unwrap(),
                [Listed { digest: manifest(), is_bundle: false }]
            );
        }
        for index in ["", "[]", "{}", r#"{"manifests": 7}"#] {
            assert!(listed(index.as_bytes()).is_err(), "{index}");
        }
    }
}
