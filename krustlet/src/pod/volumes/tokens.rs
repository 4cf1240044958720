//! The tokens of a pod's service account, as projected volumes show them: requested, kept, renewed before they are old.

use super::super::sources::{ConfigError, while_forbidden};
use futures::future::try_join_all;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount, ServiceAccountTokenProjection};
use kube::api::{Api, PostParams};
use std::collections::BTreeMap;

/// A projected token lives this long when the pod does not say.
const TOKEN_SECONDS: i64 = 3600;
/// The longest that a token is used before it is renewed, however long it lives.
const TOKEN_MAX_AGE: SignedDuration = SignedDuration::from_hours(24);

/// The volume, and the token's path in it.
pub type TokenKey = (String, String);
pub type Tokens = BTreeMap<TokenKey, Token>;

#[derive(Debug, Clone)]
pub struct Token {
    pub value: String,
    expires: Timestamp,
    renew: Timestamp,
}

impl Token {
    fn new(value: String, issued: Timestamp, expires: Timestamp) -> Self {
        let life = expires.duration_since(issued).max(SignedDuration::ZERO);
        // 80 % of its life, so that four failed renewals in five are survived.
        let age = (life / 5 * 4).min(TOKEN_MAX_AGE);
        Self { value, expires, renew: issued + age }
    }
}

/// Requests the tokens that are missing or have grown old. While one is still valid, a failed renewal is no failure.
pub async fn renew(
    client: &kube::Client,
    namespace: &str,
    pod: &Pod,
    projections: Vec<(TokenKey, &ServiceAccountTokenProjection)>,
    tokens: &mut Tokens,
) -> Result<(), ConfigError> {
    let now = Timestamp::now();
    let due = projections.into_iter().filter(|(key, _)| tokens.get(key).is_none_or(|token| token.renew <= now));
    let requests = due.map(|(key, projection)| {
        let valid = tokens.get(&key).is_some_and(|token| token.expires > now);
        async move {
            match request_token(client, namespace, pod, projection).await {
                Ok(token) => Ok(Some((key, token))),
                Err(error) if valid => {
                    tracing::warn!(namespace, volume = key.0, %error, "service account token not renewed yet");
                    Ok(None)
                }
                Err(error) => Err(error),
            }
        }
    });
    let renewed = try_join_all(requests.collect::<Vec<_>>()).await?;
    tokens.extend(renewed.into_iter().flatten());
    Ok(())
}

async fn request_token(
    client: &kube::Client,
    namespace: &str,
    pod: &Pod,
    projection: &ServiceAccountTokenProjection,
) -> Result<Token, ConfigError> {
    let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref()).unwrap_or("default");
    let api: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: projection.audience.clone().filter(|audience| !audience.is_empty()).map(|one| vec![one]),
            expiration_seconds: Some(projection.expiration_seconds.unwrap_or(TOKEN_SECONDS)),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: pod.metadata.name.clone(),
                uid: pod.metadata.uid.clone(),
            }),
            ..TokenRequestSpec::default()
        }),
        ..TokenRequest::default()
    };
    let parameters = PostParams::default();
    let failed = |cause: &str| {
        ConfigError::Missing(format!("failed to get a token for service account {namespace}/{account}: {cause}"))
    };
    let issued = Timestamp::now();
    let answer = while_forbidden(|| api.create_token_request(account, &parameters, &request))
        .await
        .map_err(|error| failed(&error.to_string()))?;
    let status = answer.status.ok_or_else(|| failed("the answer has no status"))?;
    match (status.token, status.expiration_timestamp) {
        (Some(value), Some(expires)) => Ok(Token::new(value, issued, expires.0)),
        _ => Err(failed("the answer has no token")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_renewed_at_four_fifths_of_its_life_and_at_least_daily() {
        let issued: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let token = |seconds| Token::new("t".into(), issued, issued + SignedDuration::from_secs(seconds));
        assert_eq!(token(3600).renew, issued + SignedDuration::from_secs(2880));
        assert_eq!(token(30 * 86_400).renew, issued + SignedDuration::from_hours(24));
        assert_eq!(token(-5).renew, issued);
    }
}
