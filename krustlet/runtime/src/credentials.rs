//! Credentials for registries: what a Docker config document holds, and which of it fits an image.
//!
//! Documents are read, and keys matched, by the kubelet's rules (Kubernetes 1.37, pkg/credentialprovider: config.go and
//! keyring.go), except that one unusable entry takes no other with it, and that identity and registry tokens are used.

use crate::artifact::shown;
use crate::image_name::ImageName;
use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use futures::future::BoxFuture;
use serde_json::{Map, Value};
use std::fmt;

/// Docker writes padding, `kubectl create secret` of some versions does not.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);
const DEFAULT_REGISTRY: &str = "docker.io";
/// Names of Docker Hub that are not the one that images carry.
const DEFAULT_REGISTRY_KEYS: [&str; 2] = ["index.docker.io", "registry-1.docker.io"];

/// What one registry knows its user by.
#[derive(Clone, PartialEq, Eq)]
pub struct RegistrySecret {
    /// Which images it is for: `host[:port][/path]`, where each part of the host may hold wildcards and the path is a
    /// prefix, as in the keys of a Docker config file.
    pub registry: String,
    pub login: Login,
    /// Which object of the cluster it came from; None for one of the node's own, which every pod may use.
    pub source: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Login {
    Password {
        username: String,
        password: String,
    },
    /// An OAuth 2 refresh token, which the registry's token service exchanges for an access token.
    IdentityToken(String),
    /// A bearer token for the registry itself.
    RegistryToken(String),
}

impl fmt::Debug for RegistrySecret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "RegistrySecret({} as {})", self.registry, self.login)
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// As whom, never with what.
impl fmt::Display for Login {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Password { username, .. } => write!(formatter, "user {:?}", shown(username)),
            Self::IdentityToken(_) => formatter.write_str("the bearer of an identity token"),
            Self::RegistryToken(_) => formatter.write_str("the bearer of a registry token"),
        }
    }
}

/// Where credentials come from when a pull brings none that fits.
pub trait CredentialSource: Send + Sync + 'static {
    /// Credentials for `registry` (`host[:port]`), or none for an anonymous pull.
    fn credentials<'a>(&'a self, registry: &'a str) -> BoxFuture<'a, Option<RegistrySecret>>;
}

/// A source that has none: every pull without a secret is anonymous.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoCredentials;

impl CredentialSource for NoCredentials {
    fn credentials<'a>(&'a self, _registry: &'a str) -> BoxFuture<'a, Option<RegistrySecret>> {
        Box::pin(std::future::ready(None))
    }
}

/// What a Docker config document holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DockerConfig {
    pub secrets: Vec<RegistrySecret>,
    /// What in it cannot be used, and why; for whoever wrote it.
    pub unusable: Vec<String>,
}

impl DockerConfig {
    /// Reads a `.dockerconfigjson`: `{"auths": {"host": {"auth": …}}}`.
    pub fn from_config_json(document: &[u8]) -> Result<Self, String> {
        let document = object(document)?;
        let mut config = match document.get("auths") {
            None | Some(Value::Null) => Self::default(),
            Some(Value::Object(entries)) => Self::of_entries(entries),
            Some(_) => return Err("its \"auths\" is no object".into()),
        };
        let helpers: Vec<&str> = ["credsStore", "credHelpers"]
            .into_iter()
            .filter(|key| document.get(*key).is_some_and(|value| !value.is_null()))
            .collect();
        if config.secrets.is_empty() && config.unusable.is_empty() {
            config.unusable.push(match helpers.first() {
                Some(helper) => format!(
                    "its passwords are with a credential helper ({helper}), which a node cannot run; make the Secret with \
                     `kubectl create secret docker-registry`"
                ),
                None => "it holds no credentials; make the Secret with `kubectl create secret docker-registry`".into(),
            });
        }
        Ok(config)
    }

    /// Reads a `.dockercfg`, the older form: `{"host": {"auth": …}}`.
    pub fn from_dockercfg(document: &[u8]) -> Result<Self, String> {
        let mut config = Self::of_entries(&object(document)?);
        if config.secrets.is_empty() && config.unusable.is_empty() {
            config.unusable.push("it holds no credentials".into());
        }
        Ok(config)
    }

    fn of_entries(entries: &Map<String, Value>) -> Self {
        let mut config = Self::default();
        for (registry, entry) in entries {
            match login(entry) {
                Ok(Some(login)) => {
                    config.secrets.push(RegistrySecret { registry: registry.clone(), login, source: None });
                }
                // Docker Desktop writes such entries for what it keeps elsewhere.
                Ok(None) => {}
                Err(cause) => config.unusable.push(format!("its entry for {:?} {cause}", shown(registry))),
            }
        }
        config
    }
}

fn object(document: &[u8]) -> Result<Map<String, Value>, String> {
    serde_json::from_slice(document).map_err(|_| "it is no JSON object".to_owned())
}

/// The login of one entry, None where it has none.
fn login(entry: &Value) -> Result<Option<Login>, &'static str> {
    let Value::Object(entry) = entry else {
        return if entry.is_null() { Ok(None) } else { Err("is no object") };
    };
    let field = |name: &str| match entry.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
        Some(_) => Err("has a field that is no string"),
    };
    if let Some(token) = field("registrytoken")? {
        return Ok(Some(Login::RegistryToken(token.to_owned())));
    }
    if let Some(token) = field("identitytoken")? {
        return Ok(Some(Login::IdentityToken(token.to_owned())));
    }
    if let Some(auth) = field("auth")? {
        let auth: String = auth.split_ascii_whitespace().collect();
        let decoded = BASE64.decode(auth).map_err(|_| "has an auth that is no base64")?;
        let text = String::from_utf8(decoded).map_err(|_| "has an auth that is no text")?;
        let (username, password) =
            text.split_once(':').ok_or("has an auth that is not base64 of user name, colon and password")?;
        // As docker reads it: older ones pad with zero bytes.
        let password = password.trim_matches('\0');
        return Ok(Some(Login::Password { username: username.to_owned(), password: password.to_owned() }));
    }
    let (username, password) = (field("username")?, field("password")?);
    Ok(match (username, password) {
        (None, None) => None,
        (username, password) => Some(Login::Password {
            username: username.unwrap_or_default().to_owned(),
            password: password.unwrap_or_default().to_owned(),
        }),
    })
}

impl RegistrySecret {
    /// The secrets that fit, the most specific first.
    pub(crate) fn fitting<'a>(secrets: &'a [Self], image: &ImageName) -> Vec<&'a Self> {
        let path = format!("/{}", image.repository());
        let keyed: Vec<(Key, &Self)> =
            secrets.iter().filter_map(|secret| Some((Key::parse(&secret.registry)?, secret))).collect();
        let mut fitting: Vec<&(Key, &Self)> =
            keyed.iter().filter(|(key, _)| key.matches(image.registry(), &path)).collect();
        if fitting.is_empty() && image.registry() == DEFAULT_REGISTRY {
            let default = |key: &Key| key.path.is_empty() && DEFAULT_REGISTRY_KEYS.contains(&key.host.as_str());
            fitting = keyed.iter().filter(|(key, _)| default(key)).collect();
        }
        fitting.sort_by(|(a, _), (b, _)| (&b.host, &b.path).cmp(&(&a.host, &a.path)));
        fitting.into_iter().map(|(_, secret)| *secret).collect()
    }
}

/// A key of a Docker config document.
#[derive(Debug, PartialEq, Eq)]
struct Key {
    /// In lower case, with its port.
    host: String,
    /// With its slash at the front, or empty.
    path: String,
}

impl Key {
    fn parse(key: &str) -> Option<Self> {
        let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
        let key = key.split(['?', '#']).next().unwrap_or(key);
        let (host, path) = key.split_at(key.find('/').unwrap_or(key.len()));
        let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
        if host.is_empty() {
            return None;
        }
        // The two versions of the protocol are equivalent to the host itself.
        let path = match path {
            "/v1" | "/v2" => "",
            _ if path.starts_with("/v1/") || path.starts_with("/v2/") => path.get(3..).unwrap_or_default(),
            _ => path,
        };
        let path = if path == "/" { "" } else { path };
        Some(Self { host: host.to_ascii_lowercase(), path: path.to_owned() })
    }

    fn matches(&self, registry: &str, path: &str) -> bool {
        let (host, port) = host_and_port(&self.host);
        let registry = registry.to_ascii_lowercase();
        let (target, target_port) = host_and_port(&registry);
        port == target_port
            && path.starts_with(&self.path)
            && host.split('.').count() == target.split('.').count()
            && host.split('.').zip(target.split('.')).all(|(glob, part)| glob_matches(glob.as_bytes(), part.as_bytes()))
    }
}

fn host_and_port(authority: &str) -> (&str, &str) {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => (host, port),
        _ => (authority, ""),
    }
}

/// `*`, `?` and classes such as `[a-f]`, as Go's filepath.Match has them.
fn glob_matches(mut glob: &[u8], mut text: &[u8]) -> bool {
    // Where the last star was, and what it has not taken yet.
    let mut star: Option<(&[u8], &[u8])> = None;
    loop {
        let step = match (glob.split_first(), text.split_first()) {
            (None, None) => return true,
            (Some((b'*', rest)), _) => {
                star = Some((rest, text));
                glob = rest;
                continue;
            }
            (Some((b'?', rest)), Some((_, left))) => Some((rest, left)),
            (Some((b'[', rest)), Some((byte, left))) => match class(rest, *byte) {
                Some((true, rest)) => Some((rest, left)),
                Some((false, _)) => None,
                None => return false,
            },
            (Some((expected, rest)), Some((byte, left))) if expected == byte => Some((rest, left)),
            _ => None,
        };
        match (step, star) {
            (Some(next), _) => (glob, text) = next,
            // The star takes one more.
            (None, Some((after, left))) => {
                let Some((_, left)) = left.split_first() else { return false };
                star = Some((after, left));
                (glob, text) = (after, left);
            }
            (None, None) => return false,
        }
    }
}

/// Whether the class that begins here holds the byte, and what follows the class; None when it has no end.
fn class(glob: &[u8], byte: u8) -> Option<(bool, &[u8])> {
    let (negated, mut rest) = match glob.split_first()? {
        (b'^', rest) => (true, rest),
        _ => (false, glob),
    };
    let mut found = false;
    let mut first = true;
    loop {
        match rest {
            [b']', after @ ..] if !first => return Some((found != negated, after)),
            [low, b'-', high, after @ ..] if *high != b']' => {
                found |= (*low..=*high).contains(&byte);
                rest = after;
            }
            [one, after @ ..] => {
                found |= *one == byte;
                rest = after;
            }
            [] => return None,
        }
        first = false;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::{Random, cases};
    use base64::engine::general_purpose::{STANDARD as PADDED, STANDARD_NO_PAD};
    use serde_json::json;

    fn secret(registry: &str) -> RegistrySecret {
        let login = Login::Password { username: "user".into(), password: "word".into() };
        RegistrySecret { registry: registry.into(), login, source: None }
    }

    fn fits(key: &str, image: &str) -> bool {
        !RegistrySecret::fitting(&[secret(key)], &ImageName::parse(image).unwrap()).is_empty()
    }

    fn order(keys: &[&str], image: &str) -> Vec<String> {
        let secrets: Vec<_> = keys.iter().map(|key| secret(key)).collect();
        let name = ImageName::parse(image).unwrap();
        RegistrySecret::fitting(&secrets, &name).into_iter().map(|secret| secret.registry.clone()).collect()
    }

    /// The cases of the kubelet's own test, TestURLsMatch and TestDockerKeyringForGlob in keyring_test.go.
    #[test]
    fn keys_match_by_the_kubelets_rules() {
        for (key, image, expected) in [
            ("*.kubernetes.io", "prefix.kubernetes.io/app", true),
            ("prefix.*.io", "prefix.kubernetes.io/app", true),
            ("prefix.kubernetes.*", "prefix.kubernetes.io/app", true),
            ("*-good.kubernetes.io", "prefix-good.kubernetes.io/app", true),
            ("*.kubernetes.io/blah", "prefix.kubernetes.io/blah", true),
            ("prefix.*.io/foo", "prefix.kubernetes.io/foo/bar", true),
            ("*.kubernetes.io:1111", "prefix.kubernetes.io:1111/app", true),
            ("prefix.*.io:1111", "prefix.kubernetes.io:1111/app", true),
            ("prefix.*.io:1111/foo", "prefix.kubernetes.io:1111/foo/bar", true),
            ("https://prefix.*.io:1111/v1/foo", "prefix.kubernetes.io:1111/foo/bar", true),
            ("http://prefix.*.io:1111/v2/", "prefix.kubernetes.io:1111/foo/bar", true),
            ("*.kubernetes.io", "kubernetes.io/app", false),
            ("*.*.kubernetes.io", "prefix.kubernetes.io/app", false),
            ("*kubernetes.io", "a.kubernetes.io/app", false),
            ("*.kubernetes.io", "kubernetes.com/app", false),
            ("kubernetes.io", "kubernetes.com/app", false),
            ("*.kubernetes.io/blah", "prefix.kubernetes.io/bla", false),
            ("*.kubernetes.io:443", "prefix.kubernetes.io/app", false),
            ("*.kubernetes.io", "prefix.kubernetes.io:443/app", false),
            ("*.kubernetes.io:1111/foo", "prefix.kubernetes.io:1112/foo", false),
            ("*.gcr.io", "eu.gcr.io/project/app", true),
            ("*.gcr.io", "gcr.io/project/app", false),
            ("europe-west*-docker.pkg.dev", "europe-west1-docker.pkg.dev/p/r/app", true),
            ("[a-e]u.gcr.io", "eu.gcr.io/p/app", true),
            ("[^e]u.gcr.io", "eu.gcr.io/p/app", false),
            ("[e", "eu.gcr.io/p/app", false),
            ("EU.gcr.io", "eu.gcr.io/p/app", true),
            ("https://index.docker.io/v1/", "library/app", true),
            ("docker.io", "app", true),
            ("*", "app", false),
            ("", "eu.gcr.io/p/app", false),
            ("https://", "eu.gcr.io/p/app", false),
        ] {
            assert_eq!(fits(key, image), expected, "{key} for {image}");
        }
    }

    #[test]
    fn the_most_specific_key_comes_first_and_equal_ones_in_the_order_of_the_secrets() {
        let keys = ["registry.example", "*.example", "registry.example/team", "other.example", "registry.example"];
        assert_eq!(
            order(&keys, "registry.example/team/app"),
            ["registry.example/team", "registry.example", "registry.example", "*.example"]
        );
        // Docker Hub's old name is asked only when nothing else fits.
        assert_eq!(order(&["https://index.docker.io/v1/", "docker.io"], "app"), ["docker.io"]);
    }

    #[test]
    fn a_star_takes_as_much_as_it_must_and_never_long() {
        assert!(glob_matches(b"a*b*c", b"a-b-b-c"));
        assert!(!glob_matches(b"a*b*c", b"a-b-b-"));
        let began = std::time::Instant::now();
        assert!(!glob_matches(
            &b"*a".repeat(200),
            &b"a".repeat(5000)[..4999].iter().copied().chain([b'b']).collect::<Vec<_>>()
        ));
        assert!(began.elapsed().as_secs() < 2);
    }

    /// One entry of a document in one of the shapes that are met, and the login that it stands for.
    fn entry(random: &mut Random) -> (Value, Option<Login>, bool) {
        let username = ["user", "oauth2accesstoken", "", "_json_key", "ü"][random.below(5)].to_owned();
        let password =
            ["word", "a:b:c", "", "with space", "{\"type\": \"service_account\"}"][random.below(5)].to_owned();
        let pair = format!("{username}:{password}");
        let login = Some(Login::Password { username: username.clone(), password: password.clone() });
        match random.below(14) {
            0 => (json!({}), None, false),
            1 => (json!({"email": "a@b.c"}), None, false),
            2 => (Value::Null, None, false),
            3 => (json!({"auth": ""}), None, false),
            4 => (json!({"auth": PADDED.encode(&pair)}), login, false),
            5 => (json!({"auth": STANDARD_NO_PAD.encode(&pair)}), login, false),
            6 => (json!({"auth": format!("{}\n", PADDED.encode(&pair)), "email": "x"}), login, false),
            7 => (json!({"auth": PADDED.encode(&pair), "username": "other", "password": "other"}), login, false),
            8 => match (username.is_empty(), password.is_empty()) {
                (true, true) => (json!({"username": username, "password": password}), None, false),
                _ => (json!({"username": username, "password": password, "auth": null}), login, false),
            },
            9 => {
                let user = "00000000-0000-0000-0000-000000000000:";
                (
                    json!({"auth": PADDED.encode(user), "identitytoken": "refresh"}),
                    Some(Login::IdentityToken("refresh".into())),
                    false,
                )
            }
            10 => (json!({"registrytoken": "bearer"}), Some(Login::RegistryToken("bearer".into())), false),
            11 => (json!({"auth": "no base64!"}), None, true),
            12 => (json!({"auth": PADDED.encode("without a colon")}), None, true),
            _ => ([json!("text"), json!(7), json!([1]), json!({"auth": 7})][random.below(4)].clone(), None, true),
        }
    }

    #[test]
    fn every_usable_entry_counts_whatever_stands_beside_it() {
        let mut random = Random::new(11);
        cases(5_000, || {
            let mut entries = Map::new();
            let mut expected = Vec::new();
            let mut unusable = 0;
            for number in 0..random.below(6) {
                let host = ["ghcr.io", "https://index.docker.io/v1/", "*.gcr.io", "r:5000/a", "[::1]:5", ""][number];
                let (value, login, bad) = entry(&mut random);
                entries.insert(host.to_owned(), value);
                expected.extend(login.map(|login| RegistrySecret { registry: host.into(), login, source: None }));
                unusable += usize::from(bad);
            }
            expected.sort_by(|a, b| a.registry.cmp(&b.registry));
            let mut whole = json!({"auths": entries, "HttpHeaders": {"User-Agent": "Docker-Client"}});
            match random.below(4) {
                0 => whole["credsStore"] = json!("desktop"),
                1 => whole["credHelpers"] = json!({"gcr.io": "gcloud"}),
                _ => {}
            }
            for config in [
                DockerConfig::from_config_json(whole.to_string().as_bytes()).unwrap(),
                DockerConfig::from_dockercfg(Value::Object(entries.clone()).to_string().as_bytes()).unwrap(),
            ] {
                let mut found = config.secrets.clone();
                found.sort_by(|a, b| a.registry.cmp(&b.registry));
                assert_eq!(found, expected, "{whole}");
                let told = if expected.is_empty() { unusable.max(1) } else { unusable };
                assert_eq!(config.unusable.len(), told, "{whole}");
            }
        });
    }

    #[test]
    fn documents_of_any_bytes_are_read_or_refused() {
        let entries = json!({"ghcr.io": {"auth": PADDED.encode("user:word")}, "*.gcr.io": {"identitytoken": "t"}});
        let whole = json!({"auths": entries, "credsStore": "desktop"}).to_string().into_bytes();
        let mut random = Random::new(12);
        let name = ImageName::parse("eu.gcr.io/p/app").unwrap();
        cases(20_000, || {
            for read in [DockerConfig::from_config_json, DockerConfig::from_dockercfg] {
                if let Ok(config) = read(&random.mutate(&whole)) {
                    RegistrySecret::fitting(&config.secrets, &name);
                }
            }
        });
        for garbage in ["", "[]", "7", "{", r#"{"auths": []}"#] {
            assert!(DockerConfig::from_config_json(garbage.as_bytes()).is_err(), "{garbage}");
        }
    }

    #[test]
    fn passwords_kept_by_a_helper_are_spoken_of() {
        let config = br#"{"auths": {"ghcr.io": {}}, "credsStore": "desktop"}"#;
        let config = DockerConfig::from_config_json(config).unwrap();
        assert!(config.unusable[0].contains("credsStore") && config.unusable[0].contains("kubectl create secret"));
    }

    #[test]
    fn a_password_is_not_printed() {
        assert_eq!(format!("{:?}", secret("host")), "RegistrySecret(host as user \"user\")");
        assert!(!format!("{:?}", Login::IdentityToken("word".into())).contains("word"));
    }
}
