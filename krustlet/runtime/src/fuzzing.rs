//! Ways in for the fuzzers, in this crate's tests and in `fuzz/`: each takes any bytes, and must neither panic nor accept
//! what it should not.

use crate::artifact::{Artifact, Digest};
use crate::challenge::Challenge;
use crate::credentials::{DockerConfig, RegistrySecret};
use crate::executor::Executor;
use crate::image_name::ImageName;
use crate::linkers::Linkers;
use crate::module::compile_and_link;
use crate::public_key::PublicKey;
use crate::signature::{self, Signed};
use http::HeaderValue;
use std::sync::LazyLock;

/// A key whose private half nobody has.
const KEY: &str = "-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEaxfR8uEsQkf4vOblY6RA8ncDfYEt
6zOg9KE5RdiYwpZP40Li/hp/m47n60p8D54WK84zV2sxXs7LtkBoN79R9Q==
-----END PUBLIC KEY-----
";

static EXECUTOR: LazyLock<Option<(Executor, Linkers)>> = LazyLock::new(|| {
    let executor = Executor::for_tests().ok()?;
    let linkers = Linkers::new(&executor.engine).ok()?;
    Some((executor, linkers))
});

/// A manifest, or a manifest and a config with a zero byte between them.
pub fn artifact(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let manifest = parts.next().unwrap_or_default();
    if let Ok(artifact) = Artifact::parse(manifest) {
        let _ = artifact.check_config(parts.next().unwrap_or_default());
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = Digest::parse(text);
    }
    credentials(data);
}

/// A Docker config document of either form, and an image that it may fit, or a challenge, with a zero byte between them.
pub fn credentials(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let document = parts.next().unwrap_or_default();
    let rest = parts.next().unwrap_or_default();
    let name = ImageName::parse(&String::from_utf8_lossy(rest));
    for read in [DockerConfig::from_config_json, DockerConfig::from_dockercfg] {
        if let (Ok(config), Ok(name)) = (read(document), &name) {
            let _ = RegistrySecret::fitting(&config.secrets, name);
        }
    }
    if let Ok(value) = HeaderValue::from_bytes(rest) {
        let _ = Challenge::choose(&[(http::header::WWW_AUTHENTICATE, value)].into_iter().collect());
    }
}

/// A signature manifest, or a payload and its signature with a zero byte between them.
pub fn signature(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let payload = parts.next().unwrap_or_default();
    let _ = signature::layers(payload);
    let text = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let _ = PublicKey::from_pem(&text);
    let Ok(key) = PublicKey::from_pem(KEY) else { return };
    let verified = signature::verify(&Digest::of(payload), &[Signed::simple(payload, text)], &[key]);
    assert!(verified.is_err(), "nobody has the private key");
}

/// A module of either kind.
pub fn module(data: &[u8]) {
    if let Some((executor, linkers)) = EXECUTOR.as_ref() {
        let _ = compile_and_link(executor, linkers, data);
    }
}

#[cfg(test)]
mod tests {
    use crate::artifact::tests::{config_of, manifest_of};
    use crate::testing::{Random, Signer, cases};

    #[test]
    fn manifests_and_configs_of_any_bytes_are_read_without_a_panic() {
        let config = config_of(b"module");
        let manifest = manifest_of(&config, b"module").to_string().into_bytes();
        let whole = [manifest.as_slice(), &config].join(&0);
        let mut random = Random::new(1);
        cases(20_000, || super::artifact(&random.mutate(&whole)));
    }

    #[test]
    fn credentials_of_any_bytes_are_read_without_a_panic() {
        let document = br#"{"auths": {"*.gcr.io": {"auth": "dXNlcjp3b3Jk"}, "ghcr.io": {}}, "credsStore": "desktop"}"#;
        let mut random = Random::new(4);
        for rest in [b"eu.gcr.io/p/app:v1".as_slice(), br#"Bearer realm="https://a.example/token",service="s""#] {
            let whole = [document.as_slice(), rest].join(&0);
            cases(10_000, || super::credentials(&random.mutate(&whole)));
        }
    }

    #[test]
    fn signatures_of_any_bytes_are_refused_without_a_panic() {
        let signer = Signer::new(1);
        let payload = signer.payload(&crate::artifact::Digest::of(b"manifest"));
        let whole = [payload.as_slice(), signer.signature(&payload).as_bytes()].join(&0);
        let mut random = Random::new(2);
        cases(3_000, || super::signature(&random.mutate(&whole)));
    }

    #[test]
    fn modules_of_any_bytes_are_loaded_or_refused_without_a_panic() {
        let guest = wat::parse_str(include_str!("../tests/guest.wat")).unwrap();
        let command = wat::parse_str(r#"(module (memory 1) (func (export "_start") (loop (br 0))))"#).unwrap();
        let mut random = Random::new(3);
        let mut round = 0_usize;
        cases(200, || {
            round += 1;
            super::module(&random.mutate(if round.is_multiple_of(3) { &guest } else { &command }));
        });
    }
}
