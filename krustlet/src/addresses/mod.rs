//! Which address each pod is served on: one of its own out of the node's range (`--pod-cidr`), else the node's.
//!
//! The [pool] is the rule. What it gives is written to a journal first, so that an agent that was killed neither gives an
//! address twice nor forgets whose it is, and what the API shows covers a journal that was lost.

mod pool;

use crate::pod::{full_name, is_finished, uid};
use anyhow::{Context as _, bail, ensure};
use k8s_openapi::api::core::v1::Pod;
use krustlet_runtime::Ipv4Net;
use parking_lot::Mutex;
use pool::Pool;
use std::fs::File;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;
use tracing::{info, warn};

/// The journal is written anew when it is so many times longer than what it says.
const COMPACT_FACTOR: usize = 4;
const COMPACT_LEAST: usize = 4096;
/// Stands in the journal as the holder of an address that is free.
const NOBODY: &str = "-";

/// Where a pod is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodAddress {
    pub ip: IpAddr,
    /// It is the pod's own, and its ports are containerPorts. Otherwise it is the node's.
    pub is_own: bool,
}

impl PodAddress {
    pub fn of_node(ip: IpAddr) -> Self {
        Self { ip, is_own: false }
    }
}

/// The addresses of one node.
#[derive(Debug)]
pub struct Addresses {
    node: IpAddr,
    range: Option<Range>,
    released: Arc<Notify>,
}

#[derive(Debug)]
struct Range {
    cidr: Ipv4Net,
    ledger: Mutex<Ledger>,
}

impl Addresses {
    /// Every pod is served on the node's address.
    pub fn of_node(node: IpAddr) -> Self {
        Self { node, range: None, released: Arc::default() }
    }

    /// Every pod has an address of its own. What was given before is read from the journal in the data directory.
    pub fn from_range(node: IpAddr, cidr: Ipv4Net, data_dir: &Path) -> anyhow::Result<Self> {
        let path = data_dir.join("addresses");
        let ledger = Ledger::open(path.clone(), cidr)
            .with_context(|| format!("failed to open the journal of addresses {}", path.display()))?;
        Ok(Self { range: Some(Range { cidr, ledger: Mutex::new(ledger) }), ..Self::of_node(node) })
    }

    pub fn node(&self) -> IpAddr {
        self.node
    }

    fn range_for(&self, pod: &Pod) -> Option<&Range> {
        let shares_node = pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true);
        self.range.as_ref().filter(|_| !shares_node)
    }

    /// Whether the pod has an address of its own, or gets one.
    pub fn has_own(&self, pod: &Pod) -> bool {
        self.range_for(pod).is_some()
    }

    /// The UID of the pod that has the address.
    pub fn holder(&self, address: IpAddr) -> Option<String> {
        let (Some(range), IpAddr::V4(address)) = (&self.range, address) else { return None };
        if !range.cidr.contains(&address) {
            return None;
        }
        let ledger = range.ledger.lock();
        ledger.pool.held().find(|(_, held)| *held == address).map(|(uid, _)| uid.to_owned())
    }

    /// The pod's address, if it is known already.
    pub fn of(&self, pod: &Pod) -> Option<PodAddress> {
        match self.range_for(pod) {
            None => Some(PodAddress::of_node(self.node)),
            Some(range) => range.ledger.lock().pool.of(uid(pod)).map(own),
        }
    }

    /// The pod's address, which it keeps until [`Self::release`]. Fails when every address of the range is some pod's.
    pub fn take(&self, pod: &Pod) -> Result<PodAddress, String> {
        let Some(range) = self.range_for(pod) else { return Ok(PodAddress::of_node(self.node)) };
        let mut ledger = range.ledger.lock();
        ledger.take(uid(pod)).map(own).ok_or_else(|| {
            format!(
                "all {} addresses of this node's range {} are in use; delete a pod, or give the node a larger --pod-cidr",
                ledger.pool.capacity(),
                range.cidr
            )
        })
    }

    pub fn release(&self, uid: &str) {
        if let Some(range) = &self.range
            && range.ledger.lock().release(uid)
        {
            self.released.notify_waiters();
        }
    }

    /// Completes when some address becomes free after this call.
    pub fn released(&self) -> OwnedNotified {
        self.released.clone().notified_owned()
    }

    /// At the start, with all pods of the node: those that had an address keep it, those of pods that are gone are free.
    pub fn take_up(&self, pods: &[Arc<Pod>]) {
        let Some(range) = &self.range else { return };
        let mut ledger = range.ledger.lock();
        let ours: Vec<&Arc<Pod>> =
            pods.iter().filter(|pod| !is_finished(pod) && self.range_for(pod).is_some()).collect();
        let known: std::collections::HashSet<&str> = ours.iter().map(|pod| uid(pod)).collect();
        let gone: Vec<String> =
            ledger.pool.held().map(|(uid, _)| uid).filter(|uid| !known.contains(uid)).map(str::to_owned).collect();
        for uid in gone {
            ledger.release(&uid);
        }
        for pod in ours {
            let shown = pod.status.as_ref().and_then(|status| status.pod_ip.as_deref());
            let Some(address) = shown.and_then(|ip| ip.parse::<Ipv4Addr>().ok()) else { continue };
            if ledger.pool.of(uid(pod)) != Some(address) && !ledger.adopt(uid(pod), address) {
                info!(pod = full_name(pod), %address, "the pod cannot keep its address and gets another one");
            }
        }
    }
}

fn own(address: Ipv4Addr) -> PodAddress {
    PodAddress { ip: address.into(), is_own: true }
}

/// Fails, with what to do about it, where this machine cannot serve on the range, or somebody else is served there.
pub fn check_range(cidr: Ipv4Net, others: &[IpAddr]) -> anyhow::Result<()> {
    ensure!(cidr.prefix_len() <= 30, "--pod-cidr {cidr} has no address for a pod; choose a prefix of /30 or shorter");
    for other in others {
        let IpAddr::V4(other) = other.to_canonical() else { continue };
        ensure!(!cidr.contains(&other), "--pod-cidr {cidr} contains {other}, which is no pod's; choose another range");
    }
    let last = Ipv4Addr::from(u32::from(cidr.broadcast()).saturating_sub(1));
    let first = Ipv4Addr::from(u32::from(cidr.network()).saturating_add(1));
    for address in [first, last] {
        if let Err(error) = TcpListener::bind((address, 0)) {
            bail!(
                "failed to listen on {address} of --pod-cidr {cidr}: {error}; this machine's kernel must hold the whole \
                 range as local: an alias range of a VM on Google Cloud, `ip route add local {cidr} dev lo`, or a part of \
                 127.0.0.0/8 on Linux"
            );
        }
    }
    Ok(())
}

/// The pool and its journal: a line for each address that is given (`+ HOLDER ADDRESS`) or given back (`- HOLDER`).
#[derive(Debug)]
struct Ledger {
    pool: Pool,
    path: PathBuf,
    journal: File,
    lines: usize,
}

impl Ledger {
    fn open(path: PathBuf, cidr: Ipv4Net) -> std::io::Result<Self> {
        let text = match std::fs::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error),
        };
        let mut pool = Pool::new(cidr);
        replay(&mut pool, &text);
        let (journal, lines) = write_anew(&path, &pool)?;
        Ok(Self { pool, path, journal, lines })
    }

    fn take(&mut self, holder: &str) -> Option<Ipv4Addr> {
        if let Some(address) = self.pool.of(holder) {
            return Some(address);
        }
        let address = self.pool.take(holder)?;
        self.write(&format!("+ {holder} {address}\n"));
        Some(address)
    }

    fn adopt(&mut self, holder: &str, address: Ipv4Addr) -> bool {
        let adopted = self.pool.adopt(holder, address);
        if adopted {
            self.write(&format!("+ {holder} {address}\n"));
        }
        adopted
    }

    fn release(&mut self, holder: &str) -> bool {
        let released = self.pool.release(holder);
        if released {
            self.write(&format!("- {holder}\n"));
        }
        released
    }

    /// A crash of the machine may lose the line, a crash of the agent does not. Where the disk is full, what the API shows
    /// is all that the next agent has.
    fn write(&mut self, line: &str) {
        self.lines += 1;
        let size = self.pool.held().count() + 2 * self.pool.free().count();
        let written = if self.lines > COMPACT_LEAST.max(COMPACT_FACTOR * size) {
            write_anew(&self.path, &self.pool).map(|(journal, lines)| (self.journal, self.lines) = (journal, lines))
        } else {
            self.journal.write_all(line.as_bytes())
        };
        if let Err(error) = written {
            warn!(path = %self.path.display(), "failed to write to the journal of addresses: {error}");
        }
    }
}

/// Takes in what a journal says. What it does not say whole, at the end of one that was cut off, was not done.
fn replay(pool: &mut Pool, journal: &str) {
    for line in journal.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["+", holder, address] => {
                if let Ok(address) = address.parse() {
                    pool.adopt(holder, address);
                }
            }
            ["-", holder] => _ = pool.release(holder),
            _ => {}
        }
    }
}

/// The shortest journal that says what the pool holds, in the place of the one before; and how many lines it has.
fn write_anew(path: &Path, pool: &Pool) -> std::io::Result<(File, usize)> {
    let mut text = String::new();
    for address in pool.free() {
        text += &format!("+ {NOBODY} {address}\n- {NOBODY}\n");
    }
    for (holder, address) in pool.held() {
        text += &format!("+ {holder} {address}\n");
    }
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    std::fs::rename(&new, path)?;
    Ok((file, text.lines().count()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};
    use serde_json::json;
    use std::collections::{HashMap, HashSet};

    const NODE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 9, 9));

    fn range(cidr: &str, directory: &Path) -> Addresses {
        Addresses::from_range(NODE, cidr.parse().unwrap(), directory).unwrap()
    }

    fn pod(uid: &str, shown: Option<&str>) -> Arc<Pod> {
        let status = json!({"phase": "Running", "podIP": shown});
        Arc::new(
            serde_json::from_value(json!({"metadata": {"uid": uid}, "spec": {"containers": []}, "status": status}))
                .unwrap(),
        )
    }

    fn ip(addresses: &Addresses, uid: &str) -> Option<String> {
        addresses.of(&pod(uid, None)).map(|address| address.ip.to_string())
    }

    #[test]
    fn without_a_range_and_on_the_host_network_a_pod_has_the_nodes_address() {
        let directory = tempfile::tempdir().unwrap();
        let node = Some(PodAddress::of_node(NODE));
        assert_eq!(Addresses::of_node(NODE).of(&pod("a", None)), node);
        let addresses = range("10.0.0.0/24", directory.path());
        let mut shares = (*pod("a", None)).clone();
        shares.spec.as_mut().unwrap().host_network = Some(true);
        assert_eq!(addresses.take(&shares).ok(), node);
        assert_eq!(addresses.of(&pod("a", None)), None, "not known before it is taken");
        assert!(addresses.take(&pod("a", None)).unwrap().is_own);
    }

    /// Kills the agent at every moment: after each byte of its journal.
    #[test]
    fn a_journal_that_is_cut_off_anywhere_says_what_was_so_at_some_moment() {
        let directory = tempfile::tempdir().unwrap();
        let addresses = range("10.0.0.0/28", directory.path());
        let mut dice = StdRng::seed_from_u64(7);
        let mut moments = HashSet::from([Vec::new()]);
        let holders = |addresses: &Addresses| {
            let mut held: Vec<(String, Ipv4Addr)> = {
                let ledger = addresses.range.as_ref().unwrap().ledger.lock();
                ledger.pool.held().map(|(uid, address)| (uid.to_owned(), address)).collect()
            };
            held.sort();
            held
        };
        for _ in 0..100 {
            let uid = dice.random_range(0..9).to_string();
            if dice.random() {
                drop(addresses.take(&pod(&uid, None)))
            } else {
                addresses.release(&uid)
            }
            moments.insert(holders(&addresses));
        }
        let journal = std::fs::read(directory.path().join("addresses")).unwrap();
        for end in 0..=journal.len() {
            std::fs::write(directory.path().join("addresses"), &journal[..end]).unwrap();
            assert!(moments.contains(&holders(&range("10.0.0.0/28", directory.path()))), "cut at {end}");
        }
    }

    #[test]
    fn over_any_restarts_no_address_is_anothers_and_each_pod_keeps_its_own() {
        for seed in 0..30 {
            let mut dice = StdRng::seed_from_u64(seed);
            let directory = tempfile::tempdir().unwrap();
            let mut addresses = range("10.0.0.0/27", directory.path());
            let mut held: HashMap<String, String> = HashMap::new();
            for step in 0..300 {
                let known = held.keys().nth(dice.random_range(0..=held.len())).cloned();
                match dice.random_range(0..20) {
                    0 => {
                        // The machine crashed, and lost some of the journal; the API has seen the pods.
                        if dice.random() {
                            let path = directory.path().join("addresses");
                            let text = std::fs::read(&path).unwrap();
                            std::fs::write(&path, &text[..dice.random_range(0..=text.len())]).unwrap();
                        }
                        addresses = range("10.0.0.0/27", directory.path());
                        // What the journal says of pods that are gone must not be in the way of the others.
                        let pods: Vec<Arc<Pod>> = held.iter().map(|(uid, ip)| pod(uid, Some(ip))).collect();
                        addresses.take_up(&pods);
                    }
                    1..=9 => {
                        let uid = known.unwrap_or_else(|| "unknown".to_owned());
                        addresses.release(&uid);
                        held.remove(&uid);
                    }
                    _ => {
                        // No two pods ever have the same UID.
                        let uid = known.filter(|_| dice.random()).unwrap_or_else(|| format!("{step}"));
                        let taken = addresses.take(&pod(&uid, None));
                        assert_eq!(taken.is_err(), held.len() == 30 && !held.contains_key(&uid), "seed {seed} {step}");
                        held.extend(taken.ok().map(|address| (uid, address.ip.to_string())));
                    }
                }
                assert_eq!(held.values().collect::<HashSet<_>>().len(), held.len(), "seed {seed} step {step}");
                for (uid, address) in &held {
                    assert_eq!(ip(&addresses, uid).as_ref(), Some(address), "seed {seed} step {step}");
                }
            }
        }
    }

    #[test]
    fn what_the_journal_says_wins_over_what_the_api_shows_and_another_range_gives_new_addresses() {
        let directory = tempfile::tempdir().unwrap();
        let addresses = range("10.0.0.0/24", directory.path());
        addresses.take(&pod("a", None)).unwrap();
        let addresses = range("10.0.0.0/24", directory.path());
        addresses.take_up(&[pod("b", Some("10.0.0.1")), pod("a", Some("10.0.0.9"))]);
        assert_eq!(ip(&addresses, "a").as_deref(), Some("10.0.0.1"));
        assert_eq!(ip(&addresses, "b"), None);
        let addresses = range("10.1.0.0/24", directory.path());
        addresses.take_up(&[pod("a", Some("10.0.0.1"))]);
        assert_eq!(ip(&addresses, "a"), None);
    }

    #[test]
    fn the_journal_does_not_grow_without_end() {
        let directory = tempfile::tempdir().unwrap();
        let addresses = range("10.0.0.0/29", directory.path());
        for round in 0..10_000 {
            addresses.take(&pod(&round.to_string(), None)).unwrap();
            addresses.release(&round.to_string());
        }
        let lines = std::fs::read_to_string(directory.path().join("addresses")).unwrap().lines().count();
        assert!(lines <= COMPACT_LEAST + 2, "{lines}");
        let last = addresses.take(&pod("next", None)).unwrap();
        assert_eq!(range("10.0.0.0/29", directory.path()).of(&pod("next", None)), Some(last));
    }

    #[tokio::test]
    async fn who_waits_hears_of_an_address_that_is_given_back() {
        let directory = tempfile::tempdir().unwrap();
        let addresses = range("10.0.0.0/30", directory.path());
        let (a, b) = (addresses.take(&pod("a", None)).unwrap(), addresses.take(&pod("b", None)).unwrap());
        assert_ne!(a, b);
        let why = addresses.take(&pod("c", None)).unwrap_err();
        assert!(why.contains("all 2 addresses") && why.contains("10.0.0.0/30"), "{why}");
        let released = addresses.released();
        addresses.release("a");
        released.await;
        assert_eq!(addresses.take(&pod("c", None)), Ok(a));
    }

    #[test]
    fn a_range_that_cannot_be_served_on_is_refused_with_the_reason() {
        let check = |cidr: &str, others: &[&str]| {
            let others: Vec<IpAddr> = others.iter().map(|other| other.parse().unwrap()).collect();
            check_range(cidr.parse().unwrap(), &others).map_err(|error| error.to_string())
        };
        assert!(check("198.51.100.0/24", &[]).unwrap_err().contains("ip route add local 198.51.100.0/24"));
        assert!(check("127.0.0.0/31", &[]).unwrap_err().contains("/30"));
        assert!(check("127.0.0.0/24", &["10.0.0.1", "::ffff:127.0.0.1"]).unwrap_err().contains("127.0.0.1"));
        if cfg!(target_os = "linux") {
            assert_eq!(check("127.213.0.0/16", &["127.0.0.1", "::1"]), Ok(()));
        }
    }
}
