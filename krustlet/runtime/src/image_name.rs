//! Image names, taken apart: `[host[:port]/]repository[:tag][@digest]`.

use crate::artifact::Digest;
use oci_spec::distribution::Reference;
use std::fmt;

/// An image name, taken apart.
#[derive(Debug, Clone)]
pub struct ImageName {
    reference: Reference,
    /// Host names know no case.
    registry: String,
    digest: Option<Digest>,
}

impl ImageName {
    pub fn parse(image: &str) -> Result<Self, String> {
        if image.len() > 1024 {
            return Err("it is longer than 1024 characters".into());
        }
        let reference: Reference = image.parse().map_err(|error| format!("{error}"))?;
        let digest = reference.digest().map(Digest::parse).transpose()?;
        let registry = reference.registry().to_ascii_lowercase();
        Ok(Self { reference, registry, digest })
    }

    pub fn registry(&self) -> &str {
        &self.registry
    }

    pub fn repository(&self) -> &str {
        self.reference.repository()
    }

    /// `registry/repository`.
    pub fn whole_repository(&self) -> String {
        format!("{}/{}", self.registry, self.repository())
    }

    /// The digest in the name. It wins over a tag.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// `registry/repository@digest`.
    pub fn pinned(&self, digest: &Digest) -> String {
        format!("{}@{digest}", self.whole_repository())
    }

    pub fn tag(&self) -> &str {
        self.reference.tag().unwrap_or("latest")
    }

    /// What to ask the registry for.
    pub fn wanted(&self) -> &str {
        self.digest.as_ref().map_or_else(|| self.tag(), Digest::as_str)
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.reference)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::{Random, cases};

    #[test]
    fn names_with_tag_digest_and_neither_are_taken_apart() {
        let digest = Digest::of(b"x");
        for (text, registry, repository, wanted) in [
            ("app", "docker.io", "library/app", "latest"),
            ("127.0.0.1:5000/team/app:v1", "127.0.0.1:5000", "team/app", "v1"),
            (&format!("europe-docker.pkg.dev/p/r/app@{digest}"), "europe-docker.pkg.dev", "p/r/app", digest.as_str()),
            (&format!("host.io/app:v1@{digest}"), "host.io", "app", digest.as_str()),
            ("GCR.io/app", "gcr.io", "app", "latest"),
        ] {
            let name = ImageName::parse(text).unwrap();
            assert_eq!((name.registry(), name.repository(), name.wanted()), (registry, repository, wanted), "{text}");
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in ["", "Upper Case", "host.io/App", "host.io/app:", "host.io/app@sha256:0", "host.io/../x", "a@b@c"] {
            assert!(ImageName::parse(text).is_err(), "{text}");
        }
        assert!(ImageName::parse(&"a".repeat(1025)).is_err());
        assert!(ImageName::parse(&format!("app@sha512:{}", "0".repeat(128))).unwrap_err().contains("sha256"));
        assert!(ImageName::parse(&format!("app@SHA256:{}", "0".repeat(64))).is_err());
    }

    /// Every part of a name becomes part of a URL and of a file's name.
    #[test]
    fn no_part_of_any_name_leaves_its_place_in_a_url() {
        let whole = format!("registry.example:5000/team/app:v1.0@{}", Digest::of(b"x"));
        let mut random = Random::new(21);
        cases(20_000, || {
            let text = random.mutate(whole.as_bytes());
            let Ok(name) = ImageName::parse(&String::from_utf8_lossy(&text)) else { return };
            let host = |byte: u8| byte.is_ascii_alphanumeric() || b".-:".contains(&byte);
            assert!(name.registry().bytes().all(host), "{name}");
            let part = |part: &str| !part.is_empty() && part != "." && part != "..";
            assert!(name.repository().split('/').all(part), "{name}");
            let path = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-/".contains(&byte);
            assert!(name.repository().bytes().all(path), "{name}");
            assert!(
                name.wanted().bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-:".contains(&byte)),
                "{name}"
            );
        });
    }
}
