//! `kubectl port-forward`: connections of a client to the ports that a pod is served on, through one upgraded connection.
//!
//! Only what the pod's own containers listen on is reached, whatever else this machine serves on the same address. What a
//! client can make the agent hold is bounded: its connections, the bytes that wait in them, and the time that they stand still.

mod spdy;

use super::Api;
use crate::view::View;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, StatusCode, header};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use spdy::{Frame, Reader, Writer};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const PROTOCOL: &str = "portforward.k8s.io";
const SPDY: &str = "SPDY/3.1";
/// Connections of one client to its pod at once.
const MAX_FORWARDED: usize = 64;
/// Connections of all clients at once. Each takes two of the process's file descriptors.
const MAX_FORWARDED_BY_NODE: usize = 256;
/// Clients that forward ports at once.
const MAX_CLIENTS: usize = 32;
/// Pieces that wait for the pod in each of them, and frames that wait for the client.
const WAITING: usize = 4;
/// Bytes of one client that wait for its pod, in all of its connections together.
const MAX_WAITING: usize = 512 * 1024;
const PIECE: usize = 32 * 1024;
/// As with the kubelet, a client that forwards nothing is let go.
const IDLE: Duration = Duration::from_secs(4 * 60 * 60);
const CONNECT: Duration = Duration::from_secs(10);
/// Where the client or the pod takes nothing for so long, nobody is there any more. Somebody may look at a page of an answer.
const STALLED: Duration = Duration::from_secs(5 * 60);

/// How much of it there is at once.
pub struct Places {
    clients: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

impl Default for Places {
    fn default() -> Self {
        let [clients, connections] =
            [MAX_CLIENTS, MAX_FORWARDED_BY_NODE].map(|places| Arc::new(Semaphore::new(places)));
        Self { clients, connections }
    }
}

/// Takes the request over, or says why not.
pub async fn port_forward(
    State(api): State<Arc<Api>>,
    Path((namespace, name)): Path<(String, String)>,
    mut request: Request,
) -> Response {
    let refuse = |status: StatusCode, why: String| (status, why).into_response();
    let pods = api.view.pods();
    let found = pods
        .iter()
        .find(|pod| pod.metadata.namespace.as_ref() == Some(&namespace) && pod.metadata.name.as_ref() == Some(&name));
    let Some(pod) = found.cloned() else {
        return refuse(StatusCode::NOT_FOUND, format!("pod {namespace}/{name} is not on this node\n"));
    };
    if !asks_for_spdy(request.headers()) {
        return refuse(StatusCode::BAD_REQUEST, format!("port-forward is done over {SPDY} with {PROTOCOL}\n"));
    }
    let Ok(place) = api.forwards.clients.clone().try_acquire_owned() else {
        return refuse(StatusCode::TOO_MANY_REQUESTS, "too many clients forward ports of this node\n".to_owned());
    };
    let upgrade = hyper::upgrade::on(&mut request);
    let (view, connections, shutdown) = (api.view.clone(), api.forwards.connections.clone(), api.shutdown.clone());
    tokio::spawn(async move {
        let _place = place;
        match upgrade.await {
            Ok(upgraded) => {
                let resolve = Arc::new(move |port| resolve(&*view, &pod, port));
                forward(TokioIo::new(upgraded), resolve, connections, STALLED, shutdown).await;
            }
            Err(error) => tracing::debug!(%error, "the client of a port-forward is gone"),
        }
    });
    let headers = [
        (header::CONNECTION.as_str(), "Upgrade"),
        (header::UPGRADE.as_str(), SPDY),
        ("x-stream-protocol-version", PROTOCOL),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

fn asks_for_spdy(headers: &HeaderMap) -> bool {
    let has = |name: &str, wanted: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(wanted))
    };
    has("connection", "upgrade") && has("upgrade", SPDY) && has("x-stream-protocol-version", PROTOCOL)
}

/// Where the pod is served on its port of this number: itself, or the hostPort in its place.
fn resolve(view: &dyn View, pod: &Pod, port: u16) -> Result<SocketAddr, String> {
    let served = view.served(pod.metadata.uid.as_deref().unwrap_or_default());
    let ip = pod.status.as_ref().and_then(|status| status.pod_ip.as_deref()?.parse().ok());
    let containers =
        pod.spec.iter().flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
    let declared = containers.flat_map(|container| container.ports.iter().flatten());
    let on_host = declared.filter(|declared| declared.container_port == i32::from(port));
    let on_host: Vec<u16> = on_host.filter_map(|declared| u16::try_from(declared.host_port?).ok()).collect();
    let find = |holds: &dyn Fn(&SocketAddr) -> bool| served.iter().find(|address| holds(address)).copied();
    // The pod's newest object may be older than its guest.
    find(&|address| address.port() == port && Some(address.ip()) == ip)
        .or_else(|| find(&|address| on_host.contains(&address.port())))
        .or_else(|| find(&|address| address.port() == port))
        .ok_or_else(|| {
            let mut ports: Vec<String> = served.iter().map(|address| address.port().to_string()).collect();
            ports.dedup();
            let ports = if ports.is_empty() { "nothing yet".to_owned() } else { ports.join(", ") };
            format!("the pod does not listen on port {port}; it serves on {ports}")
        })
}

type Resolve = dyn Fn(u16) -> Result<SocketAddr, String> + Send + Sync;

/// What the client sends, with its part of what may wait.
type Piece = (Vec<u8>, OwnedSemaphorePermit);

/// The two streams of a connection that the client forwards, as they come.
#[derive(Default)]
struct Pair {
    /// Where the client hears what went wrong.
    error: Option<u32>,
    data: Option<(u32, String, mpsc::Receiver<Piece>)>,
}

impl Pair {
    /// Whether a stream of this kind is one that it lacks.
    fn lacks(&self, kind: &str) -> bool {
        match kind {
            "error" => self.error.is_none(),
            "data" => self.data.is_none(),
            _ => false,
        }
    }

    fn has(&self, stream: u32) -> bool {
        self.error == Some(stream) || self.data.as_ref().is_some_and(|(data, ..)| *data == stream)
    }
}

/// Fails for what takes so long that nobody takes it.
async fn within<T>(time: Duration, work: impl Future<Output = T>) -> std::io::Result<T> {
    let ended = tokio::time::timeout(time, work).await;
    ended.map_err(|_| std::io::Error::new(std::io::ErrorKind::TimedOut, "nothing was taken for long"))
}

/// Forwards what the client asks for until it has gone.
async fn forward(
    client: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    resolve: Arc<Resolve>,
    connections: Arc<Semaphore>,
    stalled: Duration,
    shutdown: CancellationToken,
) {
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (outgoing, mut frames) = mpsc::channel::<Vec<u8>>(WAITING);
    let writing = async move {
        while let Some(frame) = frames.recv().await {
            within(stalled, to_client.write_all(&frame)).await??;
        }
        to_client.shutdown().await
    };
    let reading = async move {
        let (mut reader, mut writer) = (Reader::default(), Writer::default());
        let mut pairs: HashMap<String, Pair> = HashMap::new();
        let mut open: HashMap<u32, mpsc::Sender<Piece>> = HashMap::new();
        let waiting = Arc::new(Semaphore::new(MAX_WAITING));
        let mut last_stream = 0;
        // Ends with this future, and what it forwards with it.
        let mut forwarded = JoinSet::new();
        loop {
            let frame = match tokio::time::timeout(IDLE, reader.read(&mut from_client)).await {
                Ok(frame) => frame?,
                Err(_) if forwarded.is_empty() => return Ok(()),
                // In the middle of a frame, perhaps: there is no going on.
                Err(_) => return Err(std::io::ErrorKind::TimedOut.into()),
            };
            while forwarded.try_join_next().is_some() {}
            let answer = match frame {
                None | Some(Frame::GoAway) => return Ok(()),
                Some(Frame::Ping(number)) => Writer::pong(number),
                Some(Frame::Other) => continue,
                Some(Frame::Reset { stream }) => {
                    open.remove(&stream);
                    pairs.retain(|_, pair| !pair.has(stream));
                    continue;
                }
                Some(Frame::Data { stream, data, last }) => {
                    // What nobody takes any more, such as of an error stream, is dropped.
                    let taken = match open.get(&stream) {
                        Some(pod) if !data.is_empty() => {
                            let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
                            let part = within(stalled, waiting.clone().acquire_many_owned(size)).await?;
                            let part = part.map_err(std::io::Error::other)?;
                            within(stalled, pod.send((data, part))).await?.is_ok()
                        }
                        _ => true,
                    };
                    if last || !taken {
                        open.remove(&stream);
                    }
                    continue;
                }
                Some(Frame::Open { stream, headers }) => {
                    let of = |name: &str| headers.get(name).cloned().unwrap_or_default();
                    let (request, kind) = (of("requestid"), of("streamtype"));
                    // A client numbers its streams upwards, and with odd numbers.
                    if stream <= last_stream || stream % 2 == 0 {
                        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "a stream's number is wrong"));
                    }
                    last_stream = stream;
                    let is_wanted = match pairs.get(&request) {
                        Some(pair) => pair.lacks(&kind),
                        None => Pair::default().lacks(&kind) && pairs.len() + forwarded.len() < MAX_FORWARDED,
                    };
                    if !is_wanted {
                        Writer::refuse(stream)
                    } else {
                        let pair = pairs.entry(request.clone()).or_default();
                        if kind == "error" {
                            pair.error = Some(stream);
                        } else {
                            let (sender, receiver) = mpsc::channel(WAITING);
                            open.insert(stream, sender);
                            pair.data = Some((stream, of("port"), receiver));
                        }
                        let reply = writer.reply(stream);
                        if let Pair { error: Some(error), data: Some(_) } = pair
                            && let error = *error
                            && let Some((data, port, receiver)) = pair.data.take()
                        {
                            pairs.remove(&request);
                            let (outgoing, resolve) = (outgoing.clone(), resolve.clone());
                            // Not before the client has its reply.
                            let _ = within(stalled, outgoing.send(reply)).await?;
                            let place = connections.clone().try_acquire_owned().ok();
                            forwarded.spawn(connection(data, error, port, receiver, resolve, place, outgoing));
                            continue;
                        }
                        reply
                    }
                }
            };
            if within(stalled, outgoing.send(answer)).await?.is_err() {
                return Ok(());
            }
        }
    };
    let ended: std::io::Result<()> = tokio::select! {
        ended = reading => ended,
        ended = writing => ended,
        () = shutdown.cancelled() => Ok(()),
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a port-forward broke");
    }
}

/// One connection to the pod, whose ends and errors the client hears of.
async fn connection(
    data: u32,
    error: u32,
    port: String,
    from_client: mpsc::Receiver<Piece>,
    resolve: Arc<Resolve>,
    place: Option<OwnedSemaphorePermit>,
    to_client: mpsc::Sender<Vec<u8>>,
) {
    let result = match place {
        Some(_) => pump(data, &port, from_client, resolve, &to_client).await,
        None => Err("the node forwards as many connections as it may".to_owned()),
    };
    let _ = to_client.send(Writer::data(data, &[], true)).await;
    let told = result.err().map(|why| format!("failed to forward port {port}: {why}")).unwrap_or_default();
    let _ = to_client.send(Writer::data(error, told.as_bytes(), true)).await;
}

async fn pump(
    data: u32,
    port: &str,
    mut from_client: mpsc::Receiver<Piece>,
    resolve: Arc<Resolve>,
    to_client: &mpsc::Sender<Vec<u8>>,
) -> Result<(), String> {
    let number: u16 = port.parse().map_err(|_| format!("{port:?} is no port"))?;
    let address = resolve(number)?;
    let connecting = tokio::time::timeout(CONNECT, TcpStream::connect(address)).await;
    let pod = connecting.map_err(|_| "it does not answer".to_owned())?.map_err(|error| error.to_string())?;
    let (mut from_pod, mut to_pod) = pod.into_split();
    let sending = async {
        while let Some((piece, _part)) = from_client.recv().await {
            to_pod.write_all(&piece).await?;
        }
        to_pod.shutdown().await?;
        // The rest of the answer is still to come.
        std::future::pending::<std::io::Result<()>>().await
    };
    let receiving = async {
        let mut piece = vec![0; PIECE];
        loop {
            let length = from_pod.read(&mut piece).await?;
            let read = piece.get(..length).unwrap_or_default();
            if read.is_empty() || to_client.send(Writer::data(data, read, false)).await.is_err() {
                return Ok(());
            }
        }
    };
    let ended: std::io::Result<()> = tokio::select! {
        // An answer that came before the pod stopped to listen is not lost.
        biased;
        ended = receiving => ended,
        ended = sending => ended,
    };
    ended.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::ContainerUsage;
    use serde_json::json;
    use spdy::testing::open;

    struct Served(Vec<SocketAddr>);

    impl View for Served {
        fn pods(&self) -> Vec<Arc<Pod>> {
            Vec::new()
        }

        fn usage(&self) -> Vec<ContainerUsage> {
            Vec::new()
        }

        fn served(&self, _: &str) -> Vec<SocketAddr> {
            self.0.clone()
        }
    }

    const SHORT: Duration = Duration::from_millis(100);

    /// A session with no pod behind it, and the client's end of it.
    fn session(stalled: Duration) -> (tokio::task::JoinHandle<()>, tokio::io::DuplexStream) {
        let (client, ours) = tokio::io::duplex(64 * 1024);
        let nowhere: Arc<Resolve> = Arc::new(|port| Err(format!("nobody listens on {port}")));
        let connections = Places::default().connections;
        (tokio::spawn(forward(ours, nowhere, connections, stalled, CancellationToken::new())), client)
    }

    async fn next(client: &mut tokio::io::DuplexStream) -> Vec<u8> {
        let mut head = [0; 8];
        client.read_exact(&mut head).await.unwrap();
        let mut rest = vec![0; u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize];
        client.read_exact(&mut rest).await.unwrap();
        [head.to_vec(), rest].concat()
    }

    #[tokio::test]
    async fn streams_without_end_are_refused_and_those_that_end_make_room() {
        let (_session, mut client) = session(STALLED);
        let reply = Writer::default().reply(1)[2..4].to_vec();
        let mut accepted = 0;
        for number in 0..2000_u32 {
            let stream = 2 * number + 1;
            // Every other one wants to be a part of the first connection that has this part already.
            let request = if number % 2 == 0 { number.to_string() } else { "0".to_owned() };
            let headers = [("streamtype", "data"), ("requestid", request.as_str()), ("port", "80")];
            client.write_all(&open(stream, number == 0, &headers)).await.unwrap();
            let answer = next(&mut client).await;
            match answer[2..4] == reply[..] {
                true => accepted += 1,
                false => assert_eq!(answer, Writer::refuse(stream)),
            }
        }
        assert_eq!(accepted, MAX_FORWARDED);
        client.write_all(&Writer::refuse(1)).await.unwrap();
        client.write_all(&open(4001, false, &[("streamtype", "error"), ("requestid", "new")])).await.unwrap();
        assert_eq!(next(&mut client).await[2..4], reply[..], "the one that the client reset is gone");
    }

    #[tokio::test]
    async fn a_connection_that_cannot_be_made_is_told_on_its_error_stream() {
        let (_session, mut client) = session(STALLED);
        client.write_all(&open(1, true, &[("streamtype", "error"), ("requestid", "0")])).await.unwrap();
        client.write_all(&open(3, false, &[("streamtype", "data"), ("requestid", "0"), ("port", "80")])).await.unwrap();
        for _ in 0..2 {
            assert_eq!(next(&mut client).await[2..4], 2_u16.to_be_bytes());
        }
        assert_eq!(next(&mut client).await, Writer::data(3, &[], true));
        let told = Writer::data(1, b"failed to forward port 80: nobody listens on 80", true);
        assert_eq!(next(&mut client).await, told);
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_or_whose_pod_takes_nothing_is_let_go_and_holds_little_until_then() {
        let (session, mut client) = self::session(SHORT);
        let flood = async { while client.write_all(&Writer::pong(1)).await.is_ok() {} };
        flood.await;
        assert!(session.is_finished());
        // A stream whose other half never comes.
        let (session, mut client) = self::session(SHORT);
        client.write_all(&open(1, true, &[("streamtype", "data"), ("requestid", "0"), ("port", "80")])).await.unwrap();
        let mut sent = 0;
        while client.write_all(&Writer::data(1, &[0; PIECE], false)).await.is_ok() {
            sent += PIECE;
        }
        assert!(sent < MAX_WAITING + 256 * 1024, "{sent}");
        session.await.unwrap();
    }

    #[tokio::test]
    async fn a_stream_whose_number_is_not_the_clients_next_ends_the_session() {
        for stream in [0, 2, 5] {
            let (session, mut client) = self::session(STALLED);
            client.write_all(&open(5, true, &[("streamtype", "error"), ("requestid", "0")])).await.unwrap();
            client.write_all(&open(stream, false, &[("streamtype", "data"), ("requestid", "0")])).await.unwrap();
            session.await.unwrap();
        }
    }

    #[test]
    fn only_what_the_pod_listens_on_is_reached_and_a_port_is_found_where_it_is() {
        let ports = json!([{"containerPort": 80, "hostPort": 9080}, {"containerPort": 8080}, {"containerPort": 22}]);
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"uid": "a"}, "spec": {"containers": [{"name": "web", "ports": ports}]},
            "status": {"podIP": "10.1.0.2"},
        }))
        .unwrap();
        let found = |served: &[&str], port| {
            let served = served.iter().map(|address| address.parse().unwrap()).collect();
            resolve(&Served(served), &pod, port).map(|address| address.to_string())
        };
        let own = ["10.0.0.1:9080", "10.1.0.2:80", "10.1.0.2:8080"];
        assert_eq!(found(&own, 80).as_deref(), Ok("10.1.0.2:80"));
        assert_eq!(found(&own, 9080).as_deref(), Ok("10.0.0.1:9080"));
        assert_eq!(found(&["10.0.0.1:9080"], 80).as_deref(), Ok("10.0.0.1:9080"), "without an address of its own");
        assert!(found(&own, 22).unwrap_err().contains("it serves on 9080, 80, 8080"));
        assert!(found(&[], 80).unwrap_err().contains("nothing yet"));
    }
}
