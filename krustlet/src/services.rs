//! Kubernetes' Services by name, for guests: `NAME.NAMESPACE.svc`, resolved from Services and EndpointSlices, each request to the
//! next endpoint that is ready.
//!
//! What is called is asked for and remembered for a moment, so that a node asks for what its guests use and no more.

use crate::client::{describe, status_code};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use krustlet_runtime::NameService;
use kube::api::{Api, ListParams};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// How old an answer of the API server may be. A pod that is deleted goes on serving for longer.
const MAX_AGE: Duration = Duration::from_secs(1);
/// How long the last answer is used while the API server gives none.
const MAX_AGE_IN_OUTAGE: Duration = Duration::from_secs(60);
/// Services that are remembered; a list of allowed hosts may have a wildcard.
const MAX_KEPT: usize = 1024;
/// Services that are asked for at once.
const CONCURRENT: usize = 8;

#[derive(Clone)]
pub struct Services(Arc<Inner>);

struct Inner {
    client: kube::Client,
    kept: Mutex<HashMap<(String, String), Arc<Slot>>>,
    asking: Semaphore,
}

/// The last answer about one Service. Who asks holds the lock, so that the others wait for its answer.
#[derive(Default)]
struct Slot {
    known: tokio::sync::Mutex<Option<Known>>,
    /// Round robin.
    next: AtomicUsize,
}

struct Known {
    asked: Instant,
    answered: Instant,
    answer: Result<Arc<Backends>, String>,
}

/// What a Service leads to.
#[derive(Debug)]
struct Backends {
    service: Service,
    slices: Vec<EndpointSlice>,
}

impl NameService for Services {
    fn endpoint(&self, name: &str, port: u16) -> Option<BoxFuture<'static, Result<SocketAddr, String>>> {
        let (name, namespace) = split(name)?;
        let (services, key) = (self.clone(), (namespace.to_owned(), name.to_owned()));
        Some(async move { services.next(key, port).await }.boxed())
    }
}

/// Name and namespace of `NAME.NAMESPACE.svc`, with or without the cluster's domain.
fn split(host: &str) -> Option<(&str, &str)> {
    let host = host.strip_suffix(".cluster.local").unwrap_or(host);
    let (name, namespace) = host.strip_suffix(".svc")?.split_once('.')?;
    // Other names below a Service are those of its pods, which only DNS has.
    (!name.is_empty() && !namespace.is_empty() && !namespace.contains('.')).then_some((name, namespace))
}

impl Services {
    pub fn new(client: kube::Client) -> Self {
        Self(Arc::new(Inner { client, kept: Mutex::default(), asking: Semaphore::new(CONCURRENT) }))
    }

    async fn next(&self, key: (String, String), port: u16) -> Result<SocketAddr, String> {
        let slot = self.slot(&key);
        let backends = self.backends(&slot, &key).await?;
        let ready = backends.ready(port)?;
        let index = slot.next.fetch_add(1, Ordering::Relaxed).checked_rem(ready.len()).unwrap_or_default();
        ready.get(index).copied().ok_or_else(|| format!("Service {}/{} has no endpoint that is ready", key.0, key.1))
    }

    fn slot(&self, key: &(String, String)) -> Arc<Slot> {
        let mut kept = self.0.kept.lock();
        if kept.len() >= MAX_KEPT && !kept.contains_key(key) {
            // Those that nobody asks about at the moment and that are old.
            kept.retain(|_, slot| {
                slot.known.try_lock().map_or(true, |known| known.as_ref().is_none_or(Known::is_fresh))
            });
            if kept.len() >= MAX_KEPT {
                kept.clear();
            }
        }
        kept.entry(key.clone()).or_default().clone()
    }

    async fn backends(&self, slot: &Slot, key: &(String, String)) -> Result<Arc<Backends>, String> {
        let mut known = slot.known.lock().await;
        if let Some(known) = known.as_ref().filter(|known| known.is_fresh()) {
            return known.answer.clone();
        }
        let asked = Instant::now();
        let answer = match self.ask(key).await {
            Ok(answer) => answer.map(Arc::new),
            Err(error) => {
                let before = known.as_mut().filter(|known| known.answered.elapsed() < MAX_AGE_IN_OUTAGE);
                if let Some(known) = before.filter(|known| known.answer.is_ok()) {
                    // The API server need not be asked for every request in which it does not answer.
                    known.asked = asked;
                    return known.answer.clone();
                }
                Err(error)
            }
        };
        *known = Some(Known { asked, answered: Instant::now(), answer: answer.clone() });
        answer
    }

    /// What the API server says: the error outside when it does not answer, the one inside when there is no such Service.
    async fn ask(&self, (namespace, name): &(String, String)) -> Result<Result<Backends, String>, String> {
        let _asking = self.0.asking.acquire().await;
        let failed = |kind: &str, error: &kube::Error| match status_code(error) {
            Some(403) => {
                format!("the node may not read {kind}s; bind ClusterRole system:node-proxier to the group system:nodes")
            }
            _ => format!("failed to read {kind}s: {}", describe(error)),
        };
        let services: Api<Service> = Api::namespaced(self.0.client.clone(), namespace);
        let Some(service) = services.get_opt(name).await.map_err(|error| failed("Service", &error))? else {
            return Ok(Err(format!("there is no Service {namespace}/{name}")));
        };
        let slices: Api<EndpointSlice> = Api::namespaced(self.0.client.clone(), namespace);
        let of_service = ListParams::default().labels(&format!("kubernetes.io/service-name={name}"));
        let slices = slices.list(&of_service).await.map_err(|error| failed("EndpointSlice", &error))?.items;
        Ok(Ok(Backends { service, slices }))
    }
}

impl Known {
    fn is_fresh(&self) -> bool {
        self.asked.elapsed() < MAX_AGE
    }
}

impl Backends {
    /// Where requests to this port of the Service may go, in a fixed order.
    fn ready(&self, port: u16) -> Result<Vec<SocketAddr>, String> {
        let spec = self.service.spec.as_ref();
        if spec.and_then(|spec| spec.type_.as_deref()) == Some("ExternalName") {
            return Err("Services of type ExternalName are names for DNS alone".to_owned());
        }
        let is_tcp = |protocol: Option<&str>| matches!(protocol, None | Some("" | "TCP"));
        let ports = spec.into_iter().flat_map(|spec| spec.ports.iter().flatten());
        let wanted = ports.filter(|port| is_tcp(port.protocol.as_deref())).find(|found| found.port == i32::from(port));
        let is_headless = spec.and_then(|spec| spec.cluster_ip.as_deref()) == Some("None");
        if wanted.is_none() && !is_headless {
            return Err(format!("the Service has no TCP port {port}"));
        }
        let name = wanted.and_then(|port| port.name.as_deref()).unwrap_or_default();
        // Who is not ready any more and yet serves is better than nobody, as for kube-proxy.
        let mut found = self.endpoints(port, name, is_headless, |endpoint| {
            endpoint.conditions.as_ref().is_none_or(|conditions| conditions.ready != Some(false))
        });
        if found.is_empty() {
            found = self.endpoints(port, name, is_headless, |endpoint| {
                let conditions = endpoint.conditions.as_ref();
                conditions.is_some_and(|all| all.serving == Some(true) && all.terminating == Some(true))
            });
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    fn endpoints(
        &self,
        port: u16,
        name: &str,
        is_headless: bool,
        holds: impl Fn(&Endpoint) -> bool,
    ) -> Vec<SocketAddr> {
        let mut found = Vec::new();
        for slice in self.slices.iter().filter(|slice| slice.address_type != "FQDN") {
            let ports = slice.ports.iter().flatten();
            let number = ports
                .filter(|port| matches!(port.protocol.as_deref(), None | Some("TCP")))
                .find(|port| port.name.as_deref().unwrap_or_default() == name)
                .and_then(|port| u16::try_from(port.port?).ok());
            // A headless Service is its pods, and its ports are theirs.
            let Some(number) = (if is_headless { Some(port) } else { number }) else { continue };
            let endpoints = slice.endpoints.iter().flatten().filter(|endpoint| holds(endpoint));
            let addresses = endpoints.filter_map(|endpoint| endpoint.addresses.first()?.parse::<IpAddr>().ok());
            found.extend(addresses.map(|address| SocketAddr::new(address, number)));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::extract::{Path, State};
    use axum::http::StatusCode;
    use axum::routing::get;
    use axum::{Json, Router};
    use serde_json::{Value, json};

    #[derive(Clone, Default)]
    struct Cluster {
        service: Arc<Mutex<Option<Value>>>,
        slices: Arc<Mutex<Vec<Value>>>,
        status: Arc<Mutex<Option<u16>>>,
        asked: Arc<AtomicUsize>,
    }

    impl Cluster {
        fn services(&self) -> Services {
            let service = async |State(cluster): State<Self>, Path(name): Path<String>| {
                cluster.asked.fetch_add(1, Ordering::SeqCst);
                let status = *cluster.status.lock();
                match (status, cluster.service.lock().clone().filter(|_| name == "app")) {
                    (Some(code), _) => (StatusCode::from_u16(code).unwrap(), Json(status_of(code))),
                    (None, Some(service)) => (StatusCode::OK, Json(service)),
                    (None, None) => (StatusCode::NOT_FOUND, Json(status_of(404))),
                }
            };
            let slices = async |State(cluster): State<Self>| {
                let items = cluster.slices.lock().clone();
                Json(
                    json!({"kind": "EndpointSliceList", "apiVersion": "discovery.k8s.io/v1", "metadata": {}, "items": items}),
                )
            };
            let app = Router::new()
                .route("/api/v1/namespaces/shop/services/{name}", get(service))
                .route("/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices", get(slices))
                .with_state(self.clone());
            Services::new(kube::Client::new(app, "shop"))
        }

        fn serve(&self, spec: Value, endpoints: Value) {
            *self.service.lock() = Some(json!({"metadata": {"name": "app"}, "spec": spec}));
            let ports = json!([{"name": "other", "port": 9, "protocol": "TCP"}, {"name": "http", "port": 8080, "protocol": "TCP"}]);
            *self.slices.lock() = vec![
                json!({"metadata": {}, "addressType": "IPv4", "ports": ports, "endpoints": endpoints}),
                json!({"metadata": {}, "addressType": "FQDN", "ports": ports, "endpoints": [{"addresses": ["127.0.0.1"]}]}),
            ];
        }
    }

    fn status_of(code: u16) -> Value {
        let reason = if code == 404 { "NotFound" } else { "" };
        json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": "no"})
    }

    fn ports() -> Value {
        json!({"ports": [{"name": "http", "port": 80, "protocol": "TCP"}, {"name": "http", "port": 81, "protocol": "UDP"}]})
    }

    async fn ask(services: &Services, port: u16) -> Result<String, String> {
        services.endpoint("app.shop.svc", port).unwrap().await.map(|address| address.to_string())
    }

    #[test]
    fn names_of_services_are_known_with_and_without_the_clusters_domain_and_others_are_not() {
        for name in ["app.shop.svc", "app.shop.svc.cluster.local"] {
            assert_eq!(split(name), Some(("app", "shop")), "{name}");
        }
        for name in [
            "app.shop",
            "app.svc",
            "svc",
            ".svc",
            "pod.app.shop.svc",
            "app.shop.svc.example.com",
            "app..svc",
            ".shop.svc",
        ] {
            assert_eq!(split(name), None, "{name}");
        }
    }

    #[tokio::test]
    async fn each_request_goes_to_the_next_endpoint_that_is_ready() {
        let cluster = Cluster::default();
        cluster.serve(
            ports(),
            json!([
                {"addresses": ["10.0.0.2"], "conditions": {"ready": true}},
                {"addresses": ["10.0.0.3"], "conditions": {"ready": false, "serving": true, "terminating": true}},
                {"addresses": ["10.0.0.4"]},
            ]),
        );
        let services = cluster.services();
        let mut seen = Vec::new();
        for _ in 0..4 {
            seen.push(ask(&services, 80).await.unwrap());
        }
        assert_eq!(seen, ["10.0.0.2:8080", "10.0.0.4:8080", "10.0.0.2:8080", "10.0.0.4:8080"]);
        assert_eq!(cluster.asked.load(Ordering::SeqCst), 1, "it is asked once for all of them");
        assert!(ask(&services, 81).await.unwrap_err().contains("no TCP port 81"));
    }

    #[tokio::test]
    async fn where_all_are_going_those_that_still_serve_are_called_and_a_headless_services_ports_are_its_pods() {
        let cluster = Cluster::default();
        let going = json!([
            {"addresses": ["10.0.0.2"], "conditions": {"ready": false, "serving": false, "terminating": true}},
            {"addresses": ["10.0.0.3"], "conditions": {"ready": false, "serving": true, "terminating": true}},
        ]);
        cluster.serve(ports(), going.clone());
        assert_eq!(ask(&cluster.services(), 80).await.as_deref(), Ok("10.0.0.3:8080"));
        cluster.serve(json!({"clusterIP": "None"}), going);
        assert_eq!(ask(&cluster.services(), 7).await.as_deref(), Ok("10.0.0.3:7"));
        cluster.serve(ports(), json!([]));
        assert!(ask(&cluster.services(), 80).await.unwrap_err().contains("no endpoint that is ready"));
    }

    #[tokio::test]
    async fn what_the_api_server_says_is_told_and_while_it_is_away_the_last_answer_holds() {
        let cluster = Cluster::default();
        let services = cluster.services();
        assert_eq!(ask(&services, 80).await.unwrap_err(), "there is no Service shop/app");
        *cluster.status.lock() = Some(403);
        assert!(ask(&cluster.services(), 80).await.unwrap_err().contains("system:node-proxier"));
        *cluster.status.lock() = None;
        cluster.serve(ports(), json!([{"addresses": ["10.0.0.2"]}]));
        let services = cluster.services();
        assert!(ask(&services, 80).await.is_ok());
        *cluster.status.lock() = Some(500);
        let slot = services.slot(&("shop".to_owned(), "app".to_owned()));
        slot.known.lock().await.as_mut().unwrap().asked -= MAX_AGE;
        assert_eq!(ask(&services, 80).await.as_deref(), Ok("10.0.0.2:8080"));
    }

    #[tokio::test]
    async fn names_without_end_are_not_remembered_without_end() {
        let services = Cluster::default().services();
        for number in 0..3 * MAX_KEPT {
            services.slot(&("shop".to_owned(), number.to_string()));
        }
        assert!(services.0.kept.lock().len() <= MAX_KEPT);
    }
}
