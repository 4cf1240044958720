//! Who calls the node's API, and whether they may: client certificate or TokenReview, then SubjectAccessReview.
//!
//! The rules are those of Kubernetes 1.37's kubelet with its fine-grained authorization: a request is allowed when any
//! of the subresources of `nodes` that its path stands for is.

use axum::response::{IntoResponse, Response};
use futures::future::BoxFuture;
use http::{HeaderMap, Method, StatusCode, header};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::{Api, PostParams};
use moka::Expiry;
use moka::future::Cache;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use x509_parser::prelude::{FromDer, X509Certificate};

/// How long an answer is good for. The kubelet's defaults.
const TOKEN_TTL: Duration = Duration::from_secs(120);
const ALLOWED_TTL: Duration = Duration::from_secs(300);
const DENIED_TTL: Duration = Duration::from_secs(30);
/// Shorter, so that a token that was just made is not locked out for long.
const BAD_TOKEN_TTL: Duration = Duration::from_secs(10);
/// Answers kept of each sort.
const CACHE_SIZE: u64 = 1024;
/// Tokens that the API server is asked about at once. Anybody may bring one, and the connection that they are asked over is the
/// one that the node's own lease is renewed over.
const MAX_TOKEN_REVIEWS: usize = 16;
/// A review that takes longer has failed.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);
/// No token of a cluster comes near this.
const MAX_TOKEN: usize = 32 * 1024;

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct User {
    pub name: String,
    pub uid: Option<String>,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// The user that a verified client certificate stands for: its common name, with its organizations as groups.
    pub fn of_certificate(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let subject = certificate.subject();
        let name = subject.iter_common_name().next()?.as_str().ok().filter(|name| !name.is_empty())?;
        let groups = subject.iter_organization().filter_map(|organization| organization.as_str().ok());
        Some(Self { name: name.to_owned(), groups: groups.map(str::to_owned).collect(), ..Self::default() })
    }
}

/// What is asked for: a verb on a subresource of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Access {
    pub verb: &'static str,
    pub subresource: &'static str,
}

/// Whoever knows the cluster's users and their rights.
pub trait Reviewer: Send + Sync + 'static {
    /// The token's user, None when it is nobody's.
    fn authenticate<'a>(&'a self, token: &'a str) -> BoxFuture<'a, anyhow::Result<Option<User>>>;
    /// Whether the user may do this to this node.
    fn authorize<'a>(&'a self, user: &'a User, access: Access) -> BoxFuture<'a, anyhow::Result<bool>>;
}

/// The API server.
pub struct ClusterReviewer {
    pub client: kube::Client,
    pub node_name: String,
}

impl Reviewer for ClusterReviewer {
    fn authenticate<'a>(&'a self, token: &'a str) -> BoxFuture<'a, anyhow::Result<Option<User>>> {
        Box::pin(async move {
            let spec = TokenReviewSpec { token: token.to_owned(), ..TokenReviewSpec::default() };
            let review = TokenReview { spec, ..TokenReview::default() };
            let answer = Api::all(self.client.clone()).create(&PostParams::default(), &review).await?;
            let status = answer.status.unwrap_or_default();
            let user = status.user.filter(|_| status.authenticated == Some(true));
            Ok(user.map(|user| User {
                name: user.username.unwrap_or_default(),
                uid: user.uid,
                groups: user.groups.unwrap_or_default(),
                extra: user.extra.unwrap_or_default(),
            }))
        })
    }

    fn authorize<'a>(&'a self, user: &'a User, access: Access) -> BoxFuture<'a, anyhow::Result<bool>> {
        Box::pin(async move {
            let attributes = ResourceAttributes {
                verb: Some(access.verb.to_owned()),
                version: Some("v1".to_owned()),
                resource: Some("nodes".to_owned()),
                subresource: Some(access.subresource.to_owned()),
                name: Some(self.node_name.clone()),
                ..ResourceAttributes::default()
            };
            let spec = SubjectAccessReviewSpec {
                user: Some(user.name.clone()),
                uid: user.uid.clone(),
                groups: Some(user.groups.clone()),
                extra: Some(user.extra.clone()),
                resource_attributes: Some(attributes),
                ..SubjectAccessReviewSpec::default()
            };
            let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
            let answer = Api::all(self.client.clone()).create(&PostParams::default(), &review).await?;
            Ok(answer.status.is_some_and(|status| status.allowed && status.denied != Some(true)))
        })
    }
}

/// Decides about each request; remembers the reviewer's answers for a while.
pub struct Gate {
    reviewer: Arc<dyn Reviewer>,
    /// By the token's SHA-256: what is remembered is no token, and small.
    tokens: Cache<[u8; 32], User>,
    /// Apart from the others: any number of them can be made up, and takes no place of one that is good.
    bad_tokens: Cache<[u8; 32], ()>,
    decisions: Cache<(User, Access), bool>,
    token_reviews: Semaphore,
}

impl Gate {
    pub fn new(reviewer: Arc<dyn Reviewer>) -> Self {
        Self {
            reviewer,
            tokens: cache(|_| TOKEN_TTL),
            bad_tokens: cache(|()| BAD_TOKEN_TTL),
            decisions: cache(|allowed: &bool| if *allowed { ALLOWED_TTL } else { DENIED_TTL }),
            token_reviews: Semaphore::new(MAX_TOKEN_REVIEWS),
        }
    }

    /// Lets the request pass, or gives the answer that refuses it.
    pub async fn check(
        &self,
        certificate: Option<&User>,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<(), Response> {
        let user = match certificate {
            Some(user) => user.clone(),
            None => self.user_of_token(headers).await?,
        };
        let verb = verb(method);
        let subresources = subresources(path);
        for &subresource in &subresources {
            match self.may(&user, Access { verb, subresource }).await {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(user = user.name, verb, subresource, %error, "authorization failed");
                    let message = format!(
                        "Authorization error (user={}, verb={verb}, resource=nodes, subresource={subresource})",
                        user.name
                    );
                    return Err((StatusCode::INTERNAL_SERVER_ERROR, message).into_response());
                }
            }
        }
        let message = format!(
            "Forbidden (user={}, verb={verb}, resource=nodes, subresource(s)=[{}])\n",
            user.name,
            subresources.join(" ")
        );
        Err((StatusCode::FORBIDDEN, message).into_response())
    }

    async fn user_of_token(&self, headers: &HeaderMap) -> Result<User, Response> {
        let unauthorized = || (StatusCode::UNAUTHORIZED, "Unauthorized").into_response();
        let token = bearer_token(headers).ok_or_else(unauthorized)?;
        let key: [u8; 32] = Sha256::digest(token).into();
        if self.bad_tokens.contains_key(&key) {
            return Err(unauthorized());
        }
        let review = async {
            let answer = within_time(async {
                let _turn = self.token_reviews.acquire().await?;
                self.reviewer.authenticate(token).await
            });
            answer.await.map_err(NoUser::Unasked)?.ok_or(NoUser::Refused)
        };
        match self.tokens.try_get_with(key, review).await {
            Ok(user) => Ok(user),
            Err(error) => match &*error {
                NoUser::Refused => {
                    self.bad_tokens.insert(key, ()).await;
                    Err(unauthorized())
                }
                NoUser::Unasked(error) => {
                    tracing::warn!(%error, "token review failed");
                    let message = "Authentication error: the API server cannot be asked about the token now";
                    Err((StatusCode::SERVICE_UNAVAILABLE, message).into_response())
                }
            },
        }
    }

    async fn may(&self, user: &User, access: Access) -> Result<bool, Arc<anyhow::Error>> {
        let review = within_time(self.reviewer.authorize(user, access));
        self.decisions.try_get_with((user.clone(), access), review).await
    }
}

/// Why a token stands for nobody.
enum NoUser {
    Refused,
    Unasked(anyhow::Error),
}

/// A cache whose entries live as long as their values say.
fn cache<K, V>(time_to_live: fn(&V) -> Duration) -> Cache<K, V>
where
    K: Hash + Eq + Send + Sync + 'static,
    V: Clone + Send + Sync + 'static,
{
    Cache::builder().max_capacity(CACHE_SIZE).expire_after(TimeToLive(time_to_live)).build()
}

struct TimeToLive<V>(fn(&V) -> Duration);

impl<K, V> Expiry<K, V> for TimeToLive<V> {
    fn expire_after_create(&self, _: &K, value: &V, _: Instant) -> Option<Duration> {
        Some((self.0)(value))
    }
}

async fn within_time<T>(review: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::time::timeout(REVIEW_TIMEOUT, review).await?
}

fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.trim().split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() && token.len() <= MAX_TOKEN).then_some(token)
}

fn verb(method: &Method) -> &'static str {
    match *method {
        Method::POST => "create",
        Method::GET => "get",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "",
    }
}

/// The subresources of `nodes` that the path stands for, the finest first.
fn subresources(path: &str) -> Vec<&'static str> {
    let below = |base: &str| path.strip_prefix(base).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let fine = if below("/pods") || below("/runningpods") {
        Some("pods")
    } else if below("/healthz") {
        Some("healthz")
    } else if below("/configz") {
        Some("configz")
    } else {
        None
    };
    let coarse = if below("/stats") {
        "stats"
    } else if below("/metrics") {
        "metrics"
    } else if below("/logs") {
        "log"
    } else {
        "proxy"
    };
    fine.into_iter().chain([coarse]).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
pub mod tests {
    use super::*;
    use axum::body::to_bytes;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Knows the tokens `admin` (may everything), `metrics` (one subresource) and `nobody` (nothing).
    #[derive(Default)]
    pub struct FakeReviewer {
        pub asked: AtomicUsize,
        pub away: std::sync::atomic::AtomicBool,
    }

    impl FakeReviewer {
        fn answer<T>(&self, value: T) -> anyhow::Result<T> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            anyhow::ensure!(!self.away.load(Ordering::SeqCst), "connection refused");
            Ok(value)
        }
    }

    impl Reviewer for FakeReviewer {
        fn authenticate<'a>(&'a self, token: &'a str) -> BoxFuture<'a, anyhow::Result<Option<User>>> {
            let known = ["admin", "metrics", "nobody"].contains(&token);
            let user = known.then(|| User { name: token.to_owned(), ..User::default() });
            Box::pin(async move { self.answer(user) })
        }

        fn authorize<'a>(&'a self, user: &'a User, access: Access) -> BoxFuture<'a, anyhow::Result<bool>> {
            let allowed = match user.name.as_str() {
                "admin" => access.subresource == "proxy",
                "metrics" => access == Access { verb: "get", subresource: "metrics" },
                _ => false,
            };
            Box::pin(async move { self.answer(allowed) })
        }
    }

    fn gate() -> (Arc<FakeReviewer>, Gate) {
        let reviewer = Arc::new(FakeReviewer::default());
        (reviewer.clone(), Gate::new(reviewer))
    }

    fn token(token: &str) -> HeaderMap {
        [(header::AUTHORIZATION, format!("Bearer {token}").parse().unwrap())].into_iter().collect()
    }

    async fn refusal(gate: &Gate, path: &str, headers: &HeaderMap) -> Option<(u16, String)> {
        let response = gate.check(None, &Method::GET, path, headers).await.err()?;
        let status = response.status().as_u16();
        let body = to_bytes(response.into_body(), 4096).await.unwrap();
        Some((status, String::from_utf8(body.to_vec()).unwrap()))
    }

    #[tokio::test]
    async fn nobody_in_particular_gets_401() {
        let (reviewer, gate) = gate();
        let basic: HeaderMap = [(header::AUTHORIZATION, "Basic YWRtaW4=".parse().unwrap())].into_iter().collect();
        for headers in [HeaderMap::new(), basic, token(""), token(&"x".repeat(MAX_TOKEN + 1))] {
            assert_eq!(refusal(&gate, "/pods", &headers).await, Some((401, "Unauthorized".into())));
        }
        assert_eq!(reviewer.asked.load(Ordering::SeqCst), 0);
        assert_eq!(refusal(&gate, "/pods", &token("forged")).await, Some((401, "Unauthorized".into())));
    }

    #[tokio::test]
    async fn a_user_without_rights_gets_403_that_says_which() {
        let (_, gate) = gate();
        let message = "Forbidden (user=nobody, verb=get, resource=nodes, subresource(s)=[pods proxy])\n";
        assert_eq!(refusal(&gate, "/pods", &token("nobody")).await, Some((403, message.into())));
        let message = "Forbidden (user=metrics, verb=get, resource=nodes, subresource(s)=[proxy])\n";
        assert_eq!(refusal(&gate, "/containerLogs/a/b/c", &token("metrics")).await, Some((403, message.into())));
    }

    #[tokio::test]
    async fn the_coarse_right_opens_what_has_a_finer_one() {
        let (_, gate) = gate();
        for path in ["/pods", "/runningpods/", "/healthz", "/exec/a/b/c", "/unknown"] {
            assert_eq!(refusal(&gate, path, &token("admin")).await, None, "{path}");
        }
        assert_eq!(refusal(&gate, "/metrics/resource", &token("metrics")).await, None);
        assert!(refusal(&gate, "/metrics", &token("admin")).await.is_some(), "metrics has no coarser right");
    }

    #[tokio::test]
    async fn answers_are_remembered() {
        let (reviewer, gate) = gate();
        for _ in 0..3 {
            refusal(&gate, "/metrics", &token("metrics")).await;
            refusal(&gate, "/metrics", &token("nobody")).await;
            refusal(&gate, "/metrics", &token("forged")).await;
        }
        assert_eq!(reviewer.asked.load(Ordering::SeqCst), 5);
    }

    #[tokio::test]
    async fn while_the_api_server_is_away_the_known_pass_and_the_others_are_told_so() {
        let (reviewer, gate) = gate();
        assert_eq!(refusal(&gate, "/metrics", &token("metrics")).await, None);
        reviewer.away.store(true, Ordering::SeqCst);
        assert_eq!(refusal(&gate, "/metrics", &token("metrics")).await, None);
        assert_eq!(refusal(&gate, "/metrics", &token("admin")).await.unwrap().0, 503);
        let (status, message) = refusal(&gate, "/pods", &token("metrics")).await.unwrap();
        assert_eq!(status, 500);
        assert_eq!(message, "Authorization error (user=metrics, verb=get, resource=nodes, subresource=pods)");
    }

    #[test]
    fn paths_stand_for_the_kubelets_subresources() {
        for (path, expected) in [
            ("/pods", &["pods", "proxy"] as &[_]),
            ("/runningpods/", &["pods", "proxy"]),
            ("/healthz/ping", &["healthz", "proxy"]),
            ("/configz", &["configz", "proxy"]),
            ("/stats/summary", &["stats"]),
            ("/metrics", &["metrics"]),
            ("/metrics/resource", &["metrics"]),
            ("/metricsx", &["proxy"]),
            ("/logs/", &["log"]),
            ("/containerLogs/ns/pod/c", &["proxy"]),
            ("/exec/ns/pod/c", &["proxy"]),
            ("/", &["proxy"]),
        ] {
            assert_eq!(subresources(path), expected, "{path}");
        }
        assert_eq!((verb(&Method::POST), verb(&Method::HEAD)), ("create", ""));
    }

    #[test]
    fn a_certificates_common_name_is_the_user_and_its_organizations_are_the_groups() {
        let certificate = |entries: &[(rcgen::DnType, &str)]| {
            let mut parameters = rcgen::CertificateParams::default();
            parameters.distinguished_name = rcgen::DistinguishedName::new();
            for (kind, value) in entries {
                parameters.distinguished_name.push(kind.clone(), *value);
            }
            let key = rcgen::KeyPair::generate().unwrap();
            parameters.self_signed(&key).unwrap().der().to_vec()
        };
        let (cn, o) = (rcgen::DnType::CommonName, rcgen::DnType::OrganizationName);
        let user = User::of_certificate(&certificate(&[(cn, "apiserver"), (o.clone(), "system:masters")])).unwrap();
        assert_eq!((user.name.as_str(), user.groups), ("apiserver", vec!["system:masters".to_owned()]));
        assert_eq!(User::of_certificate(&certificate(&[(o, "group")])), None);
        assert_eq!(User::of_certificate(b"no certificate"), None);
    }

    #[tokio::test]
    async fn forged_tokens_push_out_nobody_who_is_known() {
        let (reviewer, gate) = gate();
        for _ in 0..3 {
            assert_eq!(refusal(&gate, "/metrics", &token("metrics")).await, None);
        }
        for number in 0..4 * CACHE_SIZE {
            assert_eq!(refusal(&gate, "/metrics", &token(&format!("forged-{number}"))).await.unwrap().0, 401);
        }
        gate.bad_tokens.run_pending_tasks().await;
        assert!(gate.bad_tokens.entry_count() <= CACHE_SIZE);
        reviewer.away.store(true, Ordering::SeqCst);
        assert_eq!(refusal(&gate, "/metrics", &token("metrics")).await, None);
    }

    #[tokio::test]
    async fn answers_are_good_for_a_while() {
        let short = cache::<u8, u8>(|_| Duration::from_millis(1));
        short.insert(1, 1).await;
        tokio::time::sleep(Duration::from_millis(2)).await;
        assert_eq!(short.get(&1).await, None);
        let long = cache::<u8, u8>(|_| Duration::from_secs(60));
        long.insert(1, 1).await;
        assert_eq!(long.get(&1).await, Some(1));
    }

    /// Answers nothing, and counts who waits.
    #[derive(Default)]
    struct Silent {
        asked: AtomicUsize,
    }

    impl Reviewer for Silent {
        fn authenticate<'a>(&'a self, _: &'a str) -> BoxFuture<'a, anyhow::Result<Option<User>>> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            Box::pin(std::future::pending())
        }

        fn authorize<'a>(&'a self, _: &'a User, _: Access) -> BoxFuture<'a, anyhow::Result<bool>> {
            Box::pin(async { Ok(true) })
        }
    }

    #[tokio::test]
    async fn a_flood_of_tokens_asks_the_api_server_little_and_holds_up_no_certificate() {
        let reviewer = Arc::new(Silent::default());
        let gate = Gate::new(reviewer.clone());
        let tokens: Vec<HeaderMap> =
            (0..10 * MAX_TOKEN_REVIEWS).map(|number| token(&format!("forged-{number}"))).collect();
        let mut flood: Vec<_> =
            tokens.iter().map(|headers| Box::pin(gate.check(None, &Method::GET, "/pods", headers))).collect();
        for request in &mut flood {
            assert!(futures::poll!(request).is_pending());
        }
        assert_eq!(reviewer.asked.load(Ordering::SeqCst), MAX_TOKEN_REVIEWS);
        let api_server = User { name: "kube-apiserver".into(), ..User::default() };
        assert!(gate.check(Some(&api_server), &Method::GET, "/pods", &HeaderMap::new()).await.is_ok());
        // One token, however many bring it at once, is one question.
        let same = token("same");
        let gate = Gate::new(reviewer.clone());
        let mut many: Vec<_> = (0..50).map(|_| Box::pin(gate.check(None, &Method::GET, "/pods", &same))).collect();
        let before = reviewer.asked.load(Ordering::SeqCst);
        for request in &mut many {
            assert!(futures::poll!(request).is_pending());
        }
        assert_eq!(reviewer.asked.load(Ordering::SeqCst), before + 1);
    }
}
