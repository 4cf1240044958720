//! Who built an image: SLSA provenance (v1), signed by a key that the node trusts, as cosign attests it.
//!
//! That of cosign 3 is a Sigstore bundle, that of cosign 2 a DSSE envelope, and in both there is an in-toto statement about the
//! image's digest. See slsa.dev/spec/v1.0/provenance and the attestation specification in sigstore/cosign.

use crate::artifact::{Descriptor, Digest, RawDescriptor, cut, shown};
use crate::bundle::{self, MAX_BUNDLE};
use crate::public_key::PublicKey;
use crate::signature::{MAX_SIGNATURES, Signed, Verification};
use serde::Deserialize;
use std::fmt;
use std::str::FromStr;

pub const PREDICATE_TYPE: &str = "https://slsa.dev/provenance/v1";
const ENVELOPE: &str = "application/vnd.dsse.envelope.v1+json";
const ANNOTATION: &str = "predicateType";

/// Who may have built an image: the `builder.id` of its provenance, or the beginning of one with a `*` after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Builder(String);

impl Builder {
    fn is(&self, id: &str) -> bool {
        match self.0.strip_suffix('*') {
            Some(beginning) => id.starts_with(beginning),
            None => id == self.0,
        }
    }
}

impl FromStr for Builder {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        match text.find('*') {
            _ if text.is_empty() => Err("a builder has a name, such as https://github.com/OWNER/REPOSITORY/*".into()),
            Some(place) if place + 1 != text.len() => Err(format!("{text:?} has a `*` before its end")),
            _ => Ok(Self(text.to_owned())),
        }
    }
}

impl fmt::Display for Builder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// The tag under which cosign 2 stores what is attested of a manifest.
pub fn tag(manifest: &Digest) -> String {
    format!("sha256-{}.att", manifest.hex())
}

/// The layers of what cosign 2 stores that may be provenance. What cannot be is passed over.
pub fn layers(manifest: &[u8]) -> Result<Vec<Descriptor>, String> {
    #[derive(Deserialize)]
    struct Manifest {
        layers: Vec<serde_json::Value>,
    }
    let manifest: Manifest =
        serde_json::from_slice(manifest).map_err(|error| format!("has no OCI manifest: {}", cut(&error)))?;
    let layer = |layer: serde_json::Value| {
        let layer: RawDescriptor = serde_json::from_value(layer).ok()?;
        let is_other = layer.annotations.get(ANNOTATION).is_some_and(|found| found != PREDICATE_TYPE);
        if layer.media_type != ENVELOPE || is_other {
            return None;
        }
        layer.checked("attestation", MAX_BUNDLE).ok()
    };
    Ok(manifest.layers.into_iter().filter_map(layer).take(MAX_SIGNATURES).collect())
}

/// Whether this is provenance of `manifest` by one of `builders`; false where it says something else. The error continues
/// "its provenance …".
pub fn check(signed: &Signed, manifest: &Digest, keys: &[PublicKey], builders: &[Builder]) -> Result<bool, String> {
    let statement = match signed {
        Signed::Bundle { bundle } => bundle::statement(bundle.as_bytes(), keys)?,
        Signed::Envelope { envelope } => bundle::enveloped(envelope.as_bytes(), keys)?,
        Signed::Simple { .. } => return Ok(false),
    };
    if statement.predicate_type != PREDICATE_TYPE {
        return Ok(false);
    }
    statement.is_about(manifest)?;
    match statement.predicate.pointer("/runDetails/builder/id").and_then(serde_json::Value::as_str) {
        None => Err("names no builder".into()),
        Some(id) if builders.iter().any(|builder| builder.is(id)) => Ok(true),
        Some(id) => {
            let allowed = builders.iter().map(Builder::to_string).collect::<Vec<_>>().join(" or ");
            Err(format!("names the builder {:?}, and the pod's namespace takes {allowed}", shown(id)))
        }
    }
}

/// Checks what is kept beside an image, where `builders` ask for it.
pub fn verify(
    verification: &Verification,
    manifest: &Digest,
    kept: &[Signed],
    builders: &[Builder],
) -> Result<(), String> {
    let Verification::Keys(keys) = verification else { return Ok(()) };
    if builders.is_empty() {
        return Ok(());
    }
    let mut reason = "nothing says who built it".to_owned();
    for signed in kept.iter().take(MAX_SIGNATURES) {
        match check(signed, manifest, keys, builders) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(cause) => reason = format!("its provenance {cause}"),
        }
    }
    Err(reason)
}

/// How an image comes to have it.
pub fn remedy(pinned: &str) -> String {
    format!(
        "have one of these builders build it and attest that with a key that this node trusts: \
         `cosign attest --yes --key cosign.key --use-signing-config=false --tlog-upload=false --type slsaprovenance1 \
         --predicate provenance.json {pinned}`"
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::{Random, Signer, cases};
    use serde_json::{Value, json};

    const ID: &str = "https://github.com/shop/app/.github/workflows/up.yml@refs/heads/main";

    fn manifest() -> Digest {
        Digest::of(b"manifest")
    }

    fn statement(predicate_type: &str, predicate: &Value) -> Vec<u8> {
        json!({"_type": "https://in-toto.io/Statement/v1", "subject": [{"digest": {"sha256": manifest().hex()}}],
            "predicateType": predicate_type, "predicate": predicate})
        .to_string()
        .into_bytes()
    }

    fn built_by(id: &str) -> Value {
        json!({"buildDefinition": {}, "runDetails": {"builder": {"id": id}}})
    }

    #[test]
    fn the_statement_may_be_of_the_former_kind_as_in_cosign_2() {
        let former = String::from_utf8(statement(PREDICATE_TYPE, &built_by(ID))).unwrap();
        for (kind, counts) in [("Statement/v0.1", true), ("Statement/v1", true), ("Statement/v2", false)] {
            let statement = former.replace("Statement/v1", kind);
            for signed in both(&Signer::new(1), statement.as_bytes()) {
                assert_eq!(verified(&[signed], &[ID]).is_ok(), counts, "{kind}");
            }
        }
    }

    fn both(signer: &Signer, statement: &[u8]) -> [Signed; 2] {
        let bundle = signer.bundle("application/vnd.in-toto+json", statement);
        let envelope = bundle["dsseEnvelope"].to_string();
        [Signed::Bundle { bundle: bundle.to_string() }, Signed::Envelope { envelope }]
    }

    fn builders(names: &[&str]) -> Vec<Builder> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn verified(signed: &[Signed], names: &[&str]) -> Result<(), String> {
        let keys = Verification::Keys(vec![Signer::new(1).public_key()]);
        verify(&keys, &manifest(), signed, &builders(names))
    }

    #[test]
    fn a_builder_is_named_whole_or_by_its_beginning() {
        for signed in both(&Signer::new(1), &statement(PREDICATE_TYPE, &built_by(ID))) {
            for names in [&[ID][..], &["https://github.com/shop/*"], &["*"], &["other", ID]] {
                verified(std::slice::from_ref(&signed), names).unwrap();
            }
            for name in ["https://github.com/shop", "https://github.com/shopping/*", &ID.to_uppercase(), "other"] {
                let error = verified(std::slice::from_ref(&signed), &[name]).unwrap_err();
                assert!(error.contains(ID) && error.contains(name), "{error}");
            }
        }
        for wrong in ["", " ", "a*b", "**"] {
            assert!(wrong.parse::<Builder>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn nothing_is_asked_for_where_no_builder_is_named() {
        verified(&[], &[]).unwrap();
        verify(&Verification::AllowUnsigned, &manifest(), &[], &builders(&["*"])).unwrap();
    }

    #[test]
    fn what_says_something_else_or_another_key_or_image_is_none() {
        let good = statement(PREDICATE_TYPE, &built_by(ID));
        let other = String::from_utf8(good.clone()).unwrap().replace(manifest().hex(), Digest::of(b"x").hex());
        for (signer, statement, cause) in [
            (1, statement("https://cyclonedx.org/bom", &built_by(ID)), "nothing says who built it"),
            (1, statement("https://sigstore.dev/cosign/sign/v1", &built_by(ID)), "nothing says who built it"),
            (1, statement("https://slsa.dev/provenance/v0.2", &built_by(ID)), "nothing says who built it"),
            (2, good, "made by no key that this node trusts"),
            (1, other.into_bytes(), "is for another manifest"),
            (1, statement(PREDICATE_TYPE, &json!({})), "names no builder"),
            (1, statement(PREDICATE_TYPE, &json!([1])), "names no builder"),
            (1, statement(PREDICATE_TYPE, &built_by("")), "names the builder \"\""),
            (1, statement(PREDICATE_TYPE, &json!({"runDetails": {"builder": {"id": 7}}})), "names no builder"),
            (1, b"{}".to_vec(), "malformed"),
        ] {
            for signed in both(&Signer::new(signer), &statement) {
                let error = verified(&[signed], &["https://github.com/*"]).unwrap_err();
                assert!(error.contains(cause), "{cause}: {error}");
            }
        }
        let error = verified(&[Signer::new(1).sign(&manifest())], &["*"]).unwrap_err();
        assert!(error.contains("nothing says who built it"), "{error}");
    }

    #[test]
    fn a_good_one_counts_whatever_stands_beside_it() {
        let good = both(&Signer::new(1), &statement(PREDICATE_TYPE, &built_by(ID)));
        let bad = both(&Signer::new(2), &statement(PREDICATE_TYPE, &built_by(ID)));
        let others = both(&Signer::new(1), &statement(PREDICATE_TYPE, &built_by("other")));
        verified(&[bad, others, good].concat(), &[ID]).unwrap();
    }

    #[test]
    fn altered_provenance_never_counts() {
        let keys = Verification::Keys(vec![Signer::new(1).public_key()]);
        let [_, Signed::Envelope { envelope }] = both(&Signer::new(1), &statement(PREDICATE_TYPE, &built_by("other")))
        else {
            panic!("no envelope")
        };
        let mut random = Random::new(3);
        cases(3_000, || {
            let changed = String::from_utf8_lossy(&random.mutate(envelope.as_bytes())).into_owned();
            let _ = layers(changed.as_bytes());
            let signed = [Signed::Envelope { envelope: changed }];
            assert!(verify(&keys, &manifest(), &signed, &builders(&[ID])).is_err());
        });
    }

    #[test]
    fn the_layers_are_those_that_may_be_provenance() {
        let layer = |kind: &str, annotations: Value| {
            json!({"mediaType": kind, "digest": manifest().as_str(), "size": 9,
            "annotations": annotations})
        };
        let many = [
            layer(ENVELOPE, json!({ANNOTATION: PREDICATE_TYPE})),
            layer(ENVELOPE, json!({ANNOTATION: "https://cyclonedx.org/bom"})),
            layer(ENVELOPE, json!({})),
            layer("text/plain", json!({})),
            json!(7),
            json!({"mediaType": ENVELOPE, "digest": manifest().as_str(), "size": MAX_BUNDLE + 1}),
        ];
        let found = layers(json!({"layers": many}).to_string().as_bytes()).unwrap();
        assert_eq!(found.len(), 2);
        let many = vec![layer(ENVELOPE, json!({})); 1000];
        assert_eq!(layers(json!({"layers": many}).to_string().as_bytes()).unwrap().len(), MAX_SIGNATURES);
        assert!(layers(b"[]").is_err());
    }
}
