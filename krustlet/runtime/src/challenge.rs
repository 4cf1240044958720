//! How a registry asks who its client is: the challenges of a 401.

use crate::artifact::shown;
use http::header::WWW_AUTHENTICATE;
use http::{HeaderMap, Uri};
use std::collections::BTreeMap;

/// What the registry wants to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Challenge {
    /// A token of the token service at `realm`.
    Bearer { realm: String, service: Option<String> },
    /// User name and password.
    Basic,
}

impl Challenge {
    /// Chooses among the challenges of an answer; a token is preferred to a password. The error says what was asked for.
    pub fn choose(headers: &HeaderMap) -> Result<Self, String> {
        let mut basic = false;
        let mut schemes = Vec::new();
        for value in headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok()) {
            for challenge in http_auth::ChallengeParser::new(value).filter_map(Result::ok) {
                let parameters: BTreeMap<String, String> = challenge
                    .params
                    .iter()
                    .map(|(name, value)| (name.to_ascii_lowercase(), value.to_unescaped()))
                    .collect();
                if challenge.scheme.eq_ignore_ascii_case("bearer") {
                    let realm = parameters.get("realm").ok_or("its challenge names no realm")?;
                    if realm.parse::<Uri>().map_or(true, |realm| realm.host().is_none()) {
                        return Err(format!("the realm of its challenge, {:?}, is no URL", shown(realm)));
                    }
                    return Ok(Self::Bearer { realm: realm.clone(), service: parameters.get("service").cloned() });
                }
                basic |= challenge.scheme.eq_ignore_ascii_case("basic");
                schemes.push(shown(challenge.scheme));
            }
        }
        match (basic, schemes.first()) {
            (true, _) => Ok(Self::Basic),
            (false, Some(scheme)) => Err(format!("it asks for {scheme:?}, which this node does not know")),
            (false, None) => Err("it does not say how to show who one is".into()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::{Random, cases};
    use http::HeaderValue;

    fn choose(values: &[&str]) -> Result<Challenge, String> {
        Challenge::choose(
            &values.iter().map(|value| (WWW_AUTHENTICATE, HeaderValue::from_str(value).unwrap())).collect(),
        )
    }

    #[test]
    fn a_token_is_preferred_wherever_its_challenge_stands() {
        let bearer = Challenge::Bearer { realm: "https://auth.example/token".into(), service: Some("registry".into()) };
        let challenge = r#"bEARER Realm="https://auth.example/token",service="registry",scope="x""#;
        for values in
            [&[challenge] as &[&str], &["Basic realm=\"x\"", challenge], &[&format!("Basic realm=\"x\", {challenge}")]]
        {
            assert_eq!(choose(values).unwrap(), bearer, "{values:?}");
        }
        assert_eq!(choose(&["basic realm=\"x\""]).unwrap(), Challenge::Basic);
    }

    #[test]
    fn what_cannot_be_answered_is_told() {
        for (values, cause) in [
            (&[] as &[&str], "does not say"),
            (&["Negotiate"], "\"Negotiate\""),
            (&["Bearer service=\"x\""], "no realm"),
            (&["Bearer realm=\"/token\""], "no URL"),
            (&["Bearer realm=\"not a url\""], "no URL"),
        ] {
            let error = choose(values).unwrap_err();
            assert!(error.contains(cause), "{values:?}: {error}");
        }
    }

    #[test]
    fn challenges_of_any_bytes_are_read_or_refused() {
        let whole = br#"Basic realm="a", Bearer realm="https://auth.example/token",service="registry",scope="a:b\"c""#;
        let mut random = Random::new(22);
        cases(20_000, || {
            if let Ok(value) = HeaderValue::from_bytes(&random.mutate(whole)) {
                let _ = Challenge::choose(&[(WWW_AUTHENTICATE, value)].into_iter().collect());
            }
        });
    }
}
