//! Signatures in cosign's formats, checked with the public keys that the node was given.
//!
//! cosign 3's are Sigstore bundles, see `bundle`. One of cosign 2 is an ECDSA P-256 signature (DER, base64, in a layer's
//! annotation) over a simple-signing payload (that layer's content) which names the manifest's digest. See the signature
//! specification in sigstore/cosign.

use crate::artifact::{Descriptor, Digest, RawDescriptor, cut, shown};
use crate::bundle;
use crate::public_key::{PublicKey, der, is_signed_by};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};

pub const SIMPLE_SIGNING: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
pub const ANNOTATION: &str = "dev.cosignproject.cosign/signature";
const PAYLOAD_TYPE: &str = "cosign container image signature";

/// Payloads are some 250 bytes; this leaves room for annotations.
pub const MAX_PAYLOAD: u64 = 64 * 1024;
/// Signatures beyond this many are not looked at.
pub const MAX_SIGNATURES: usize = 32;
/// Of each of them, some kilobytes of certificate and log entry stand in the manifest.
pub const MAX_SIGNATURE_MANIFEST: u64 = 512 * 1024;

/// Who may sign what this node runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verification {
    /// One of these keys must have signed the manifest.
    Keys(Vec<PublicKey>),
    /// Run anything. For development only.
    AllowUnsigned,
}

impl Verification {
    /// What others can name the keys by: the first half of the SHA-256 sum, in hex, of their SPKIs (DER) in ascending order.
    /// None where there are no keys.
    pub fn fingerprint(&self) -> Option<String> {
        let Self::Keys(keys) = self else { return None };
        let mut keys: Vec<_> = keys.iter().map(PublicKey::spki).collect();
        keys.sort_unstable();
        keys.dedup();
        Some(Digest::of(&keys.concat()).hex().chars().take(32).collect())
    }
}

/// A signature as fetched; kept next to the image so that it can be checked again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Signed {
    /// Base64 of the payload's bytes, and of the DER signature over it.
    Simple {
        payload: String,
        signature: String,
    },
    Bundle {
        bundle: String,
    },
    /// Of cosign 2's attestations, which are no signatures.
    Envelope {
        envelope: String,
    },
}

/// What a signature manifest holds.
#[derive(Debug, Default)]
pub struct Layers {
    pub signatures: Vec<SignatureLayer>,
    /// What is wrong with the others that are meant as signatures.
    pub malformed: Vec<String>,
}

/// Where a signature manifest says that a payload is, and the signature over it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignatureLayer {
    pub payload: Descriptor,
    pub signature: String,
}

impl Signed {
    pub fn simple(payload: &[u8], signature: String) -> Self {
        Self::Simple { payload: BASE64.encode(payload), signature }
    }

    /// Checks that one of `keys` signed `manifest` by this. The error continues "its signature …".
    pub fn check(&self, manifest: &Digest, keys: &[PublicKey]) -> Result<(), String> {
        match self {
            Self::Bundle { bundle } => bundle::verify(bundle.as_bytes(), manifest, keys),
            Self::Envelope { .. } => Err("is an attestation and no signature".into()),
            Self::Simple { payload, signature } => match signed_manifest(payload, signature, keys) {
                Ok(Some(digest)) if digest == *manifest => Ok(()),
                Ok(Some(digest)) => Err(format!("is for another manifest, {digest}")),
                Ok(None) => Err("was made by no key that this node trusts, or altered".into()),
                Err(error) => Err(format!("is malformed: {error}")),
            },
        }
    }
}

/// The tag under which cosign stores the signatures of a manifest.
pub fn tag(manifest: &Digest) -> String {
    format!("sha256-{}.sig", manifest.hex())
}

/// Reads a signature manifest. Layers of other types are passed over, as cosign does, and those that cannot be signatures take
/// nothing from what is there.
pub fn layers(manifest: &[u8]) -> Result<Layers, String> {
    #[derive(Deserialize)]
    struct Manifest {
        layers: Vec<serde_json::Value>,
    }
    if manifest.len() as u64 > MAX_SIGNATURE_MANIFEST {
        return Err(format!("has a manifest of more than {MAX_SIGNATURE_MANIFEST} bytes"));
    }
    let manifest: Manifest =
        serde_json::from_slice(manifest).map_err(|error| format!("has no OCI manifest: {}", cut(&error)))?;
    let mut found = Layers::default();
    for layer in manifest.layers {
        match signature_layer(layer) {
            Ok(Some(layer)) if found.signatures.len() < MAX_SIGNATURES => found.signatures.push(layer),
            Ok(_) => {}
            Err(cause) if found.malformed.len() < MAX_SIGNATURES => {
                found.malformed.push(format!("is malformed: {cause}"))
            }
            Err(_) => {}
        }
    }
    Ok(found)
}

/// None for a layer of another type.
fn signature_layer(layer: serde_json::Value) -> Result<Option<SignatureLayer>, String> {
    let layer: RawDescriptor = serde_json::from_value(layer).map_err(|error| cut(&error))?;
    if layer.media_type != SIMPLE_SIGNING {
        return Ok(None);
    }
    let signature = layer.annotations.get(ANNOTATION).ok_or_else(|| format!("without annotation {ANNOTATION}"))?;
    der(signature)?;
    let payload = layer.checked("signature payload", MAX_PAYLOAD).map_err(|refused| refused.to_string())?;
    Ok(Some(SignatureLayer { payload, signature: signature.clone() }))
}

/// The command that makes an image one that runs, in either version of cosign and without a network beyond the registry.
pub fn remedy(pinned: &str) -> String {
    format!(
        "sign it with a key that this node trusts: \
         `cosign sign --yes --key cosign.key --use-signing-config=false --tlog-upload=false {pinned}`"
    )
}

/// Checks that one of `keys` signed `manifest` by one of these.
pub fn verify(manifest: &Digest, signatures: &[Signed], keys: &[PublicKey]) -> Result<(), String> {
    let mut reason = "it is not signed".to_owned();
    for signed in signatures.iter().take(MAX_SIGNATURES) {
        match signed.check(manifest, keys) {
            Ok(()) => return Ok(()),
            Err(cause) => reason = format!("its signature {cause}"),
        }
    }
    Err(reason)
}

/// The manifest digest that the payload vouches for, if one of the keys signed the payload.
fn signed_manifest(payload: &str, signature: &str, keys: &[PublicKey]) -> Result<Option<Digest>, String> {
    let signature = der(signature)?;
    let payload = BASE64.decode(payload).map_err(|error| format!("payload is no base64: {error}"))?;
    if !is_signed_by(keys, &payload, &signature) {
        return Ok(None);
    }
    payload_manifest(&payload).map(Some)
}

/// The digest inside a simple-signing payload.
fn payload_manifest(payload: &[u8]) -> Result<Digest, String> {
    #[derive(Deserialize)]
    struct Payload {
        critical: Critical,
    }
    #[derive(Deserialize)]
    struct Critical {
        image: Image,
        r#type: String,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Image {
        docker_manifest_digest: String,
    }
    if payload.len() as u64 > MAX_PAYLOAD {
        return Err(format!("the payload has {} bytes, more than the {MAX_PAYLOAD} allowed", payload.len()));
    }
    let payload: Payload =
        serde_json::from_slice(payload).map_err(|error| format!("no simple-signing payload: {}", cut(&error)))?;
    if payload.critical.r#type != PAYLOAD_TYPE {
        return Err(format!("payload type {:?}, expected {PAYLOAD_TYPE:?}", shown(&payload.critical.r#type)));
    }
    Digest::parse(&payload.critical.image.docker_manifest_digest)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::public_key::MAX_ENCODED;
    use crate::testing::{Random, Signer, cases};
    use serde_json::json;

    fn signature_of(signed: &Signed) -> String {
        match signed {
            Signed::Simple { signature, .. } => signature.clone(),
            Signed::Bundle { .. } | Signed::Envelope { .. } => String::new(),
        }
    }

    fn manifest() -> Digest {
        Digest::of(b"manifest")
    }

    #[test]
    fn a_signature_by_a_trusted_key_is_accepted() {
        let signer = Signer::new(1);
        verify(&manifest(), &[signer.sign(&manifest())], &[signer.public_key()]).unwrap();
    }

    /// Key, payload and signature are as cosign 2.6.5 made them (`generate-key-pair`, `sign --key`).
    #[test]
    fn what_cosign_itself_signed_is_accepted() {
        let key = PublicKey::from_pem(
            "-----BEGIN PUBLIC KEY-----\n\
             MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAECMo3P0dpD4T93QRp4cNe7U6bYcGU\n\
             IQBDBpI6sVrfrVMXjYDwU95rMKpQ0uf78xLLk3HXQZ5whP0LsDxOD/+Vig==\n\
             -----END PUBLIC KEY-----\n",
        )
        .unwrap();
        let manifest =
            Digest::parse("sha256:821e9b9c22aca642a51e95755f7a1631c27b7eb990addb101c89e70e2f15e7a0").unwrap();
        let payload = format!(
            r#"{{"critical":{{"identity":{{"docker-reference":"127.0.0.1:18555/app"}},"image":{{"docker-manifest-digest":"{manifest}"}},"type":"cosign container image signature"}},"optional":null}}"#
        );
        let signature =
            "MEUCIQDVId/wY+6871mhzYX5ZeFdF5zXdgnIx/Ys/xWcTfPQPQIgIpNgPK7U6NWH1EQ1fmXmV6tC8GYu9fJ1xY3beZB/qEg=";
        let signed = Signed::simple(payload.as_bytes(), signature.into());
        verify(&manifest, &[signed], &[key]).unwrap();
    }

    #[test]
    fn one_trusted_signature_among_several_and_several_keys_is_enough() {
        let (ours, theirs) = (Signer::new(1), Signer::new(2));
        let signatures = [theirs.sign(&manifest()), ours.sign(&manifest())];
        let unrelated = Signer::new(3).public_key();
        verify(&manifest(), &signatures, &[unrelated, ours.public_key()]).unwrap();
    }

    #[test]
    fn an_unsigned_manifest_is_refused() {
        let error = verify(&manifest(), &[], &[Signer::new(1).public_key()]).unwrap_err();
        assert!(error.contains("not signed"), "{error}");
    }

    #[test]
    fn a_signature_by_another_key_is_refused() {
        let error =
            verify(&manifest(), &[Signer::new(2).sign(&manifest())], &[Signer::new(1).public_key()]).unwrap_err();
        assert!(error.contains("made by no key that this node trusts"), "{error}");
        assert!(verify(&manifest(), &[Signer::new(2).sign(&manifest())], &[]).is_err());
    }

    #[test]
    fn a_payload_for_another_manifest_is_refused() {
        let signer = Signer::new(1);
        let signed = signer.sign(&Digest::of(b"another"));
        let error = verify(&manifest(), &[signed], &[signer.public_key()]).unwrap_err();
        assert!(error.contains("another manifest"), "{error}");
    }

    #[test]
    fn a_payload_that_was_altered_is_refused() {
        let signer = Signer::new(1);
        let signed = signer.sign(&Digest::of(b"another"));
        let altered = Signed::simple(&signer.payload(&manifest()), signature_of(&signed));
        assert!(verify(&manifest(), &[altered], &[signer.public_key()]).is_err());
    }

    #[test]
    fn a_payload_of_another_type_is_refused() {
        let signer = Signer::new(1);
        let payload = json!({"critical": {"identity": {"docker-reference": ""}, "type": "atomic container signature",
            "image": {"docker-manifest-digest": manifest().as_str()}}, "optional": null});
        let error = verify(&manifest(), &[signer.sign_payload(payload.to_string().as_bytes())], &[signer.public_key()])
            .unwrap_err();
        assert!(error.contains("atomic container signature"), "{error}");
    }

    #[test]
    fn a_key_of_another_curve_and_garbage_are_no_public_keys() {
        for pem in [
            "",
            "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
            "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n-----END PUBLIC KEY-----\n",
        ] {
            assert!(PublicKey::from_pem(pem).is_err(), "{pem}");
        }
    }

    /// A signature manifest with these layers.
    fn document(layers: &[serde_json::Value]) -> Vec<u8> {
        json!({"schemaVersion": 2, "layers": layers}).to_string().into_bytes()
    }

    fn good_layer() -> serde_json::Value {
        let signer = Signer::new(1);
        let payload = signer.payload(&manifest());
        json!({"mediaType": SIMPLE_SIGNING, "digest": Digest::of(&payload).as_str(), "size": payload.len(),
            "annotations": {ANNOTATION: signature_of(&signer.sign(&manifest()))}})
    }

    #[test]
    fn a_signature_manifest_gives_its_simple_signing_layers_and_no_others() {
        let good = good_layer();
        let other = json!({"mediaType": "text/plain", "digest": "x", "size": 1});
        let found = layers(&document(&[other, good.clone()])).unwrap().signatures;
        assert_eq!(found.len(), 1);
        assert_eq!(found.first().unwrap().signature, good["annotations"][ANNOTATION]);
        assert_eq!(layers(&document(&vec![good; 1000])).unwrap().signatures.len(), MAX_SIGNATURES);
    }

    #[test]
    fn a_malformed_layer_takes_nothing_from_the_good_one_beside_it() {
        let good = good_layer();
        let changed = |pointer: &str, value: serde_json::Value| {
            let mut layer = good.clone();
            *layer.pointer_mut(pointer).unwrap() = value;
            layer
        };
        let without = |key: &str| {
            let mut layer = good.clone();
            layer.as_object_mut().unwrap().remove(key);
            layer
        };
        let signature = "/annotations/dev.cosignproject.cosign~1signature";
        let malformed = [
            json!(null),
            json!(7),
            json!("layer"),
            json!([]),
            json!({}),
            without("mediaType"),
            without("digest"),
            without("size"),
            without("annotations"),
            changed("/digest", json!("sha512:00")),
            changed("/digest", json!(7)),
            changed("/size", json!(-1)),
            changed("/size", json!(MAX_PAYLOAD + 1)),
            changed("/size", json!("12")),
            changed("/annotations", json!([])),
            changed(signature, json!(7)),
            changed(signature, json!("no base64!")),
            changed(signature, json!("c2ln")),
            changed(signature, json!("A".repeat(MAX_ENCODED + 1))),
        ];
        // Also when there are more of them than signatures are looked at.
        let many: Vec<_> = malformed.iter().cycle().take(10 * MAX_SIGNATURES).cloned().collect();
        for bad in malformed.iter().map(std::slice::from_ref).chain([many.as_slice()]) {
            for document in [
                document(&[bad, std::slice::from_ref(&good)].concat()),
                document(&[std::slice::from_ref(&good), bad].concat()),
            ] {
                let found = layers(&document).unwrap();
                assert_eq!(found.signatures.len(), 1, "{}", String::from_utf8_lossy(&document));
                let reasons = found.malformed.len();
                assert!(reasons > 0 && reasons <= MAX_SIGNATURES, "{}", String::from_utf8_lossy(&document));
            }
        }
    }

    #[test]
    fn altered_payloads_and_signatures_are_refused() {
        let signer = Signer::new(1);
        let keys = [signer.public_key()];
        let payload = signer.payload(&manifest());
        let signed = signer.sign(&manifest());
        let document = json!({"schemaVersion": 2, "layers": [{"mediaType": SIMPLE_SIGNING, "size": payload.len(),
            "digest": Digest::of(&payload).as_str(), "annotations": {ANNOTATION: signature_of(&signed)}}]})
        .to_string()
        .into_bytes();
        let mut random = Random::new(2);
        cases(3_000, || {
            let _ = layers(&random.mutate(&document));
            let _ = payload_manifest(&random.mutate(&payload));
            let mutated = random.mutate(&payload);
            if mutated != payload {
                let candidate = Signed::simple(&mutated, signature_of(&signed));
                assert!(verify(&manifest(), &[candidate], &keys).is_err());
            }
            let signature = random.mutate(signature_of(&signed).as_bytes());
            let mutated = String::from_utf8_lossy(&signature).into_owned();
            let candidate = Signed::simple(&payload, mutated.clone());
            if verify(&manifest(), std::slice::from_ref(&candidate), &keys).is_ok() {
                // White space around the base64 is the only change that may be let through.
                assert_eq!(mutated.trim(), signature_of(&signed).trim());
            }
        });
    }
}
