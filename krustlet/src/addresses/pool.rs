//! The addresses of one range, each with at most one holder. No I/O.

use krustlet_runtime::Ipv4Net;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::Ipv4Addr;

#[derive(Debug)]
pub struct Pool {
    /// The lowest address that may never have been given, the network's own left out; beyond `last` when there is none.
    next: u64,
    /// The highest address that is given: the one below the broadcast address.
    last: u64,
    range: Ipv4Net,
    held: HashMap<String, Ipv4Addr>,
    holding: HashSet<Ipv4Addr>,
    /// What was given back, in that order.
    free: BTreeMap<u64, Ipv4Addr>,
    free_since: HashMap<Ipv4Addr, u64>,
    releases: u64,
}

impl Pool {
    pub fn new(range: Ipv4Net) -> Self {
        Self {
            next: u64::from(u32::from(range.network())) + 1,
            last: u64::from(u32::from(range.broadcast())).saturating_sub(1),
            range,
            held: HashMap::new(),
            holding: HashSet::new(),
            free: BTreeMap::new(),
            free_since: HashMap::new(),
            releases: 0,
        }
    }

    /// How many pods can have an address at once.
    pub fn capacity(&self) -> u64 {
        self.last.saturating_sub(u64::from(u32::from(self.range.network())))
    }

    pub fn of(&self, holder: &str) -> Option<Ipv4Addr> {
        self.held.get(holder).copied()
    }

    /// The holder's address: the one that it has, else one that nobody had yet, else the one that has been free for longest.
    pub fn take(&mut self, holder: &str) -> Option<Ipv4Addr> {
        if let Some(address) = self.of(holder) {
            return Some(address);
        }
        let address = self.unused().or_else(|| self.free.values().next().copied())?;
        self.give(holder, address);
        Some(address)
    }

    /// Has the holder keep an address that it was given before. Refused where it is another's, the holder has another one, or
    /// the range has it not to give.
    pub fn adopt(&mut self, holder: &str, address: Ipv4Addr) -> bool {
        let number = u64::from(u32::from(address));
        let given = self.range.contains(&address) && address != self.range.network() && number <= self.last;
        if !given || self.holding.contains(&address) || self.held.contains_key(holder) {
            return false;
        }
        self.give(holder, address);
        true
    }

    pub fn release(&mut self, holder: &str) -> bool {
        let Some(address) = self.held.remove(holder) else { return false };
        self.holding.remove(&address);
        self.releases += 1;
        self.free.insert(self.releases, address);
        self.free_since.insert(address, self.releases);
        true
    }

    pub fn held(&self) -> impl Iterator<Item = (&str, Ipv4Addr)> {
        self.held.iter().map(|(holder, address)| (holder.as_str(), *address))
    }

    /// What was given back, the longest free first.
    pub fn free(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.free.values().copied()
    }

    fn give(&mut self, holder: &str, address: Ipv4Addr) {
        if let Some(release) = self.free_since.remove(&address) {
            self.free.remove(&release);
        }
        self.held.insert(holder.to_owned(), address);
        self.holding.insert(address);
    }

    fn unused(&mut self) -> Option<Ipv4Addr> {
        while self.next <= self.last {
            let address = Ipv4Addr::from(u32::try_from(self.next).ok()?);
            if !self.holding.contains(&address) && !self.free_since.contains_key(&address) {
                return Some(address);
            }
            self.next += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};
    use std::collections::VecDeque;

    fn pool(range: &str) -> Pool {
        Pool::new(range.parse().unwrap())
    }

    #[test]
    fn neither_the_networks_own_address_nor_the_broadcast_address_is_given() {
        for (range, capacity) in
            [("10.0.0.0/30", 2), ("10.0.0.0/29", 6), ("10.1.2.0/24", 254), ("255.255.255.252/30", 2)]
        {
            let mut pool = pool(range);
            assert_eq!(pool.capacity(), capacity, "{range}");
            let given: HashSet<Ipv4Addr> = (0..capacity).map(|n| pool.take(&n.to_string()).unwrap()).collect();
            assert_eq!(given.len() as u64, capacity, "{range}");
            let net: Ipv4Net = range.parse().unwrap();
            assert!(given.iter().all(|a| net.contains(a) && *a != net.network() && *a != net.broadcast()), "{range}");
            assert_eq!(pool.take("one more"), None, "{range}");
            assert!(!pool.adopt("another", net.network()) && !pool.adopt("another", net.broadcast()), "{range}");
        }
        assert_eq!(pool("10.0.0.0/31").take("a"), None);
        assert_eq!(pool("10.0.0.0/32").take("a"), None);
        assert_eq!(pool("0.0.0.0/0").capacity(), (1 << 32) - 2);
    }

    /// Takes, gives back and adopts at random, held against a list that does the same slowly.
    #[test]
    fn no_address_has_two_holders_and_none_is_lost_and_the_longest_free_is_given_first() {
        for seed in 0..300 {
            let mut dice = StdRng::seed_from_u64(seed);
            let range: Ipv4Net = format!("10.0.0.0/{}", dice.random_range(26..=30)).parse().unwrap();
            let mut pool = Pool::new(range);
            let mut held: HashMap<String, Ipv4Addr> = HashMap::new();
            let mut never: VecDeque<Ipv4Addr> = range.hosts().collect();
            let mut free: VecDeque<Ipv4Addr> = VecDeque::new();
            for _ in 0..400 {
                let holder = dice.random_range(0..80).to_string();
                match dice.random_range(0..5) {
                    0 | 1 => {
                        let expected = held.get(&holder).copied();
                        let expected = expected.or_else(|| never.pop_front()).or_else(|| free.pop_front());
                        assert_eq!(pool.take(&holder), expected, "seed {seed}");
                        held.extend(expected.map(|address| (holder, address)));
                    }
                    2 | 3 => {
                        let address = held.remove(&holder);
                        assert_eq!(pool.release(&holder), address.is_some(), "seed {seed}");
                        free.extend(address);
                    }
                    _ => {
                        let address = Ipv4Addr::from(u32::from(range.network()) + dice.random_range(0..70));
                        let possible =
                            !held.contains_key(&holder) && (never.contains(&address) || free.contains(&address));
                        assert_eq!(pool.adopt(&holder, address), possible, "seed {seed}");
                        if possible {
                            never.retain(|other| *other != address);
                            free.retain(|other| *other != address);
                            held.insert(holder, address);
                        }
                    }
                }
                assert_eq!(pool.capacity(), (held.len() + never.len() + free.len()) as u64, "seed {seed}");
                assert!(held.iter().all(|(holder, address)| pool.of(holder) == Some(*address)), "seed {seed}");
                assert!(pool.free().eq(free.iter().copied()), "seed {seed}");
            }
        }
    }
}
