//! Where the node connects to for a pod: to what the pod's guests listen on, and else to where they may connect to.
//!
//! Host and port of a probe or a hook are for the pod's author to choose, and the connection is the node's: with the node's
//! loopback, its link and its metadata server at hand, as the kubelet's is. Whether it succeeded is something that an author
//! learns. A kubelet lets a probe go to any port of the pod's address, where nobody but the pod listens; here that address may
//! be the node's, and one of the pod's own is held by the node's kernel, which gives it to whoever listens on all addresses.

use crate::view::View;
use krustlet_runtime::EgressPolicy;
use std::io::{Error, ErrorKind, Result};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

/// Names that may be resolved at once for all pods: each holds a thread, which nothing can call back.
static LOOKUPS: Semaphore = Semaphore::const_new(32);

#[derive(Clone)]
pub struct Reach(Option<ForPod>);

#[derive(Clone)]
struct ForPod {
    uid: String,
    address: IpAddr,
    view: Arc<dyn View>,
    policy: Arc<EgressPolicy>,
}

impl Reach {
    /// For what no pod has a hand in.
    pub const ANYWHERE: Self = Self(None);

    /// For a pod that is at this address; `view` tells where its guests listen.
    pub fn of_pod(uid: &str, address: IpAddr, view: Arc<dyn View>, policy: Arc<EgressPolicy>) -> Self {
        Self(Some(ForPod { uid: uid.to_owned(), address, view, policy }))
    }

    /// Connects to the first address of the host that is permitted and answers; takes as long as that takes.
    pub async fn connect(&self, host: &str, port: u16) -> Result<TcpStream> {
        let mut failed = Error::new(ErrorKind::NotFound, "the name has no address");
        for address in self.resolve(host, port).await? {
            let connecting = async {
                self.judge(address)?;
                TcpStream::connect(address).await
            };
            match connecting.await {
                Ok(stream) => return Ok(stream),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    fn judge(&self, address: SocketAddr) -> Result<()> {
        match &self.0 {
            Some(pod) => pod.judge(address).map_err(|why| Error::new(ErrorKind::PermissionDenied, why)),
            None => Ok(()),
        }
    }

    async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>> {
        if let Ok(address) = host.parse() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        if let Some(pod) = &self.0 {
            pod.policy.permits_name(host).map_err(|refused| {
                let why = format!("{host} is {refused}, where the node does not go for a pod");
                Error::new(ErrorKind::PermissionDenied, why)
            })?;
        }
        let permit = LOOKUPS.acquire().await.map_err(Error::other)?;
        let host = host.to_owned();
        let lookup = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            (host.as_str(), port).to_socket_addrs().map(Vec::from_iter)
        });
        lookup.await.map_err(Error::other).flatten()
    }
}

impl ForPod {
    fn judge(&self, address: SocketAddr) -> std::result::Result<(), String> {
        let (ip, port) = (address.ip().to_canonical(), address.port());
        let served = self.view.served(&self.uid);
        if served.contains(&SocketAddr::new(ip, port)) {
            return Ok(());
        }
        self.policy.permits(address.ip()).map_err(|refused| {
            if ip != self.address {
                return format!("{} is {refused}, where the node does not go for a pod", address.ip());
            }
            let ports: Vec<String> = served.iter().map(|served| served.port().to_string()).collect();
            let ports = if ports.is_empty() { "none".to_owned() } else { ports.join(", ") };
            format!(
                "port {port} of {ip} is not this pod's, which serves on {ports}: the node does not go there for a pod"
            )
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::view::ContainerUsage;
    use k8s_openapi::api::core::v1::Pod;
    use tokio::net::TcpListener;

    async fn server() -> (TcpListener, u16) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    }

    /// A pod that listens there.
    struct Listening(Vec<SocketAddr>);

    impl View for Listening {
        fn pods(&self) -> Vec<Arc<Pod>> {
            Vec::new()
        }

        fn usage(&self) -> Vec<ContainerUsage> {
            Vec::new()
        }

        fn served(&self, uid: &str) -> Vec<SocketAddr> {
            if uid == "mine" { self.0.clone() } else { Vec::new() }
        }
    }

    fn pod(address: &str, ports: &[u16], open: &[&str]) -> Reach {
        let address: IpAddr = address.parse().unwrap();
        let open = open.iter().map(|network| network.parse().unwrap()).collect();
        let listening = ports.iter().map(|port| SocketAddr::new(address, *port)).collect();
        let policy = EgressPolicy::new(open, Vec::new());
        Reach::of_pod("mine", address, Arc::new(Listening(listening)), Arc::new(policy))
    }

    #[tokio::test]
    async fn a_pod_is_reached_wherever_it_is_and_nothing_else_of_the_node_in_any_spelling() {
        let (_listener, port) = server().await;
        for host in ["127.0.0.1", "::ffff:127.0.0.1"] {
            assert!(pod("127.0.0.1", &[port], &[]).connect(host, port).await.is_ok(), "{host}");
        }
        for host in ["127.0.0.1", "localhost", "::ffff:127.0.0.1", "127.1", "2130706433", "0x7f000001", "0.0.0.0"] {
            let error = pod("127.0.0.2", &[port], &[]).connect(host, port).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{host}: {error}");
        }
        for host in ["169.254.169.254", "metadata.google.internal", "fd20:ce::254", "fe80::1"] {
            let error = pod("127.0.0.2", &[port], &["127.0.0.0/8"]).connect(host, port).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{host}: {error}");
        }
    }

    #[tokio::test]
    async fn of_the_pods_address_only_the_ports_that_it_serves_on_are_reached() {
        let ((_one, own), (_other, others)) = (server().await, server().await);
        let reach = pod("127.0.0.1", &[own], &[]);
        assert!(reach.connect("127.0.0.1", own).await.is_ok());
        for host in ["127.0.0.1", "localhost", "::ffff:127.0.0.1"] {
            let error = reach.connect(host, others).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{host}: {error}");
        }
        let error = reach.connect("127.0.0.1", others).await.unwrap_err().to_string();
        assert!(error.contains(&format!("port {others} of 127.0.0.1 is not this pod's")), "{error}");
        assert!(error.contains(&format!("serves on {own}")), "{error}");
        let nothing = pod("127.0.0.1", &[], &[]).connect("127.0.0.1", own).await.unwrap_err().to_string();
        assert!(nothing.contains("serves on none"), "{nothing}");
    }

    #[tokio::test]
    async fn what_the_node_opens_to_guests_is_open_here_too() {
        let (_listener, port) = server().await;
        for host in ["127.0.0.1", "localhost"] {
            let reach = pod("127.0.0.2", &[], &["127.0.0.0/8", "::1/128"]);
            assert!(reach.connect(host, port).await.is_ok(), "{host}");
            assert!(Reach::ANYWHERE.connect(host, port).await.is_ok(), "{host}");
        }
    }
}
