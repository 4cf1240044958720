//! The life of a pod under random events in random order, held against what must never be.
//!
//! A [`World`] does what the lifecycle asks for, or fails to, sooner or later or too late, and knows what really runs. A seed
//! that fails is printed; `KRUSTLET_MODEL_SEED=N` runs it alone, `KRUSTLET_MODEL_SEEDS=N` runs so many.

use super::super::failure::{Failure, Obstacle};
use super::super::guest::GuestKind;
use super::super::probes::{ProbeEvent, ProbeKind};
use super::super::{containers, is_finished};
use super::event::{Effect, Event, Launched};
use super::sim::{Sim, container, end, pod, post_start};
use k8s_openapi::api::core::v1::PodStatus;
use serde_json::{Value, json};
use std::collections::{HashMap, VecDeque};
use std::time::Duration;

const STEPS: usize = 150;

/// xorshift64*: enough for orders of events, and the same on every machine.
struct Dice(u64);

impl Dice {
    fn throw(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % sides
    }

    fn one_in(&mut self, sides: u64) -> bool {
        self.throw(sides) == 0
    }

    fn of<T: Clone>(&mut self, all: &[T]) -> T {
        all[usize::try_from(self.throw(all.len() as u64)).unwrap()].clone()
    }
}

struct Guest {
    generation: u32,
    stopping: bool,
    hook: bool,
}

#[derive(Default)]
struct Place {
    preparing: Option<u32>,
    guest: Option<Guest>,
    swapping: bool,
    /// How often a guest was started, over all agents.
    launches: i32,
}

struct World {
    seed: u64,
    dice: Dice,
    sim: Sim,
    kinds: Vec<GuestKind>,
    /// A command that may run once, whatever its exit code.
    once: Vec<bool>,
    places: Vec<Place>,
    writing: Option<Box<PodStatus>>,
    deleting: bool,
    refreshing: bool,
    image_changed: bool,
    /// Reports that may come once more, too late.
    past: Vec<Event>,
    phase: u8,
    restarts: HashMap<String, i32>,
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the seed is {}: KRUSTLET_MODEL_SEED={0} runs it alone", self.seed);
        }
    }
}

fn rank(phase: &str) -> u8 {
    match phase {
        "Pending" => 0,
        "Running" => 1,
        "Succeeded" => 2,
        "Failed" => 3,
        other => panic!("phase {other:?}"),
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        for _ in 0..4 {
            dice.throw(2);
        }
        let (spec, kinds) = any_spec(&mut dice);
        let object = pod(spec);
        let spec = object.spec.clone().unwrap();
        let once = containers(&spec)
            .zip(&kinds)
            .map(|((_, container), kind)| {
                let policy = container.restart_policy.as_ref().or(spec.restart_policy.as_ref());
                *kind == GuestKind::Command
                    && policy.is_some_and(|policy| policy == "Never")
                    && spec.containers.iter().all(|container| container.restart_policy_rules.is_none())
            })
            .collect();
        let places = kinds.iter().map(|_| Place::default()).collect();
        let mut world = Self {
            seed,
            dice,
            sim: Sim::of(object, None),
            kinds,
            once,
            places,
            writing: None,
            deleting: false,
            refreshing: false,
            image_changed: false,
            past: Vec::new(),
            phase: 0,
            restarts: HashMap::new(),
        };
        let begun = std::mem::take(&mut world.sim.done);
        world.perform(begun);
        world
    }

    fn step(&mut self, event: Event) {
        if event.run().is_some() {
            self.past.push(event.clone());
        }
        let effects = self.sim.step(event);
        self.perform(effects);
        // Whoever sleeps until a time that is past never sleeps.
        for _ in 0..3 {
            if self.sim.life.deadline().is_none_or(|at| at > self.sim.now.at) || self.sim.life.is_done() {
                return;
            }
            let effects = self.sim.step(Event::Tick);
            self.perform(effects);
        }
        panic!("a deadline stays in the past: {:?} at {:?}", self.sim.life.deadline(), self.sim.now.at);
    }

    /// As the worker does it: all effects of a step, and then what was answered at once.
    fn perform(&mut self, effects: Vec<Effect>) {
        let mut answers = VecDeque::new();
        let mut next = Some(effects);
        while let Some(effects) = next {
            for effect in effects {
                answers.extend(self.perform_one(effect));
            }
            next = answers.pop_front().map(|answer| {
                if let Event::Launched { index, result: Ok(_), .. } = &answer {
                    self.places[*index].launches += 1;
                }
                self.sim.step(answer)
            });
        }
    }

    fn perform_one(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Prepare { index, generation } => {
                assert!(!self.sim.life.finished, "prepared after the end");
                assert!(self.places[index].guest.is_none(), "prepared beside its guest");
                self.places[index].preparing = Some(generation);
            }
            Effect::Abandon { index } => {
                assert!(self.places[index].guest.is_none(), "a guest is abandoned without an end");
                self.places[index].preparing = None;
            }
            Effect::Launch { index, generation, attempt } => {
                let result = self.launch(index, generation, attempt);
                return Some(Event::Launched { index, generation, result });
            }
            Effect::PostStart { index, .. } => self.guest(index).hook = true,
            Effect::Probe { index, .. } => _ = self.guest(index),
            Effect::Stop { index, generation, .. } => {
                let guest = self.guest(index);
                assert!(!guest.stopping, "stopped twice");
                assert_eq!(guest.generation, generation);
                guest.stopping = true;
            }
            Effect::Hasten { index, .. } => assert!(self.guest(index).stopping),
            Effect::Dispose { index } => assert!(self.places[index].guest.is_none(), "disposed of alive"),
            Effect::Swap { index, .. } => {
                self.guest(index);
                self.places[index].swapping = true;
            }
            Effect::AbandonSwap { index } => self.places[index].swapping = false,
            Effect::Write(status) => {
                assert!(self.writing.is_none(), "two writes at once");
                self.check(&status);
                self.writing = Some(status);
            }
            Effect::Delete => {
                assert!(self.places.iter().all(|place| place.guest.is_none()), "deleted while a guest runs");
                assert!(!self.deleting);
                self.deleting = true;
            }
            Effect::Refresh => {
                assert!(!self.refreshing, "two refreshes at once");
                self.refreshing = true;
            }
            Effect::Remember { .. }
            | Effect::ReleasePorts { .. }
            | Effect::Tell { .. }
            | Effect::CountRestart
            | Effect::CountReady => {}
        }
        None
    }

    fn guest(&mut self, index: usize) -> &mut Guest {
        self.places[index].guest.as_mut().expect("there is a guest")
    }

    fn launch(&mut self, index: usize, generation: u32, attempt: i32) -> Result<Launched, Failure> {
        let (image_changed, once, kind) = (self.image_changed, self.once[index], self.kinds[index]);
        let place = &mut self.places[index];
        assert!(place.guest.is_none(), "two runs at once");
        assert!(!self.sim.life.finished, "a run after the end");
        assert!(!is_finished(self.sim.life.pod()), "a run after another hand ended the pod");
        assert_eq!(attempt, place.launches, "each run has its own number");
        place.preparing = None;
        if self.dice.one_in(8) {
            return Err(Failure::port("taken"));
        }
        assert!(!once || image_changed || place.launches == 0, "a command that may run once runs again");
        place.guest = Some(Guest { generation, stopping: false, hook: false });
        Ok(Launched { kind, image: "app@sha256:1".into(), addresses: Vec::new(), unserved: Vec::new() })
    }

    /// What the API is told.
    fn check(&mut self, status: &PodStatus) {
        let phase = rank(status.phase.as_deref().unwrap());
        assert!(phase >= self.phase, "from phase {} back to {phase}", self.phase);
        assert!(self.phase < 2 || phase == self.phase, "one end becomes another");
        self.phase = phase;
        // What another hand says of a pod is no end of its guests yet.
        if phase >= 2 && !is_finished(self.sim.life.pod()) {
            assert!(self.places.iter().all(|place| place.guest.is_none()), "told as ended while a guest runs");
        }
        let names: Vec<String> =
            containers(self.sim.object.spec.as_ref().unwrap()).map(|(_, container)| container.name.clone()).collect();
        for shown in status.container_statuses.iter().chain(&status.init_container_statuses).flatten() {
            let before = self.restarts.insert(shown.name.clone(), shown.restart_count).unwrap_or(0);
            assert!(shown.restart_count >= before, "{} restarts become {}", before, shown.restart_count);
            let index = names.iter().position(|name| *name == shown.name).unwrap();
            assert_eq!(shown.restart_count, (self.places[index].launches - 1).max(0), "every run is counted");
            let running = shown.state.as_ref().is_some_and(|state| state.running.is_some());
            // What stops with the agent is shown as it was.
            let alive = self.places[index].guest.is_some() || self.sim.life.shutdown;
            assert!(!running || alive, "shown as running, and there is no guest");
        }
    }

    // ---- what may happen ----

    fn happen(&mut self) {
        let index = usize::try_from(self.dice.throw(self.places.len() as u64)).unwrap();
        match self.dice.throw(26) {
            0..=4 => self.prepare(index),
            5..=7 => self.end(index, false),
            8..=9 => self.post_start(index),
            10 => self.probe(index),
            11 => self.swap(index),
            12..=14 => self.write(),
            15..=17 => {
                let time = self.dice.of(&[1, 300, 2_000, 11_000, 70_000, 400_000]);
                self.sim.now.at += Duration::from_millis(time);
                self.sim.now.time += jiff::SignedDuration::from_millis(time.try_into().unwrap());
                self.step(Event::Tick);
            }
            18 => self.late(),
            19 => {
                let released = self.dice.of(&[Obstacle::Port, Obstacle::Address]);
                self.step(Event::Released(released));
            }
            20 if std::mem::take(&mut self.refreshing) => {
                if self.dice.one_in(6) {
                    self.step(Event::Evicted("too much".to_owned()));
                }
                self.step(Event::Refreshed { error: None });
            }
            21 => self.show(),
            22 if self.dice.one_in(3) => self.change(),
            23 if self.dice.one_in(6) => {
                let grace = self.dice.of(&[0, 2, 30]);
                self.delete(grace);
            }
            24 if self.dice.one_in(6) => self.crash(),
            25 if self.dice.one_in(8) => self.step(Event::ShuttingDown),
            _ => {}
        }
    }

    fn show(&mut self) {
        let effects = self.sim.show();
        self.perform(effects);
    }

    fn prepare(&mut self, index: usize) {
        let Some(generation) = self.places[index].preparing.take() else { return };
        let result = if self.dice.one_in(5) {
            let kinds = [Obstacle::Image, Obstacle::Configuration, Obstacle::Container, Obstacle::Address];
            let obstacle = self.dice.of(&kinds);
            Err(Failure { obstacle, ..Failure::container("no") })
        } else {
            Ok(self.kinds[index])
        };
        self.step(Event::Prepared { index, generation, result, prepared: true });
    }

    /// Its guest ends: by itself, or because it is to.
    fn end(&mut self, index: usize, favourably: bool) {
        let kind = self.kinds[index];
        let Some(guest) = &self.places[index].guest else { return };
        if (kind == GuestKind::Server || favourably) && !guest.stopping {
            return;
        }
        let (generation, stopping) = (guest.generation, guest.stopping);
        let code = match kind {
            GuestKind::Server => 0,
            GuestKind::Command if stopping && !self.dice.one_in(4) => 137,
            GuestKind::Command => self.dice.of(&[0, 0, 1, 42, 88]),
        };
        self.places[index].guest = None;
        self.places[index].swapping = false;
        self.step(Event::Ended { index, generation, end: end(code) });
    }

    fn post_start(&mut self, index: usize) {
        let failed = self.dice.one_in(3);
        let Some(guest) = self.places[index].guest.as_mut().filter(|guest| guest.hook) else { return };
        guest.hook = false;
        let generation = guest.generation;
        let result = if failed { Err("no".to_owned()) } else { Ok(()) };
        self.step(Event::PostStarted { index, generation, result });
    }

    fn probe(&mut self, index: usize) {
        let Some(guest) = &self.places[index].guest else { return };
        let generation = guest.generation;
        let probe = self.dice.of(&[
            ProbeEvent::Started,
            ProbeEvent::Ready(true),
            ProbeEvent::Ready(false),
            ProbeEvent::Unhealthy { kind: ProbeKind::Readiness, message: "no".into() },
            ProbeEvent::Failed { kind: ProbeKind::Liveness, message: "dead".into() },
        ]);
        self.step(Event::Probed { index, generation, probe });
    }

    fn swap(&mut self, index: usize) {
        if !std::mem::take(&mut self.places[index].swapping) {
            return;
        }
        let generation = self.sim.generation(index);
        let result = if self.dice.one_in(3) { Err(Failure::container("no")) } else { Ok("app@sha256:2".into()) };
        self.step(Event::Swapped { index, generation, result });
    }

    fn write(&mut self) {
        let Some(status) = self.writing.take() else { return };
        let answer = self.dice.throw(8);
        if answer < 6 {
            // Arrived, though its answer may be lost.
            let mut kept = (*status).clone();
            if is_finished(&self.sim.object) {
                kept.phase = self.sim.object.status.as_ref().and_then(|status| status.phase.clone());
            }
            self.sim.object.status = Some(kept);
        }
        let result = match answer {
            0..=4 => Ok(u64::MAX),
            5 | 6 => Err(None),
            _ => Err(Some(404)),
        };
        self.step(Event::Written { status, result });
    }

    fn late(&mut self) {
        if !self.past.is_empty() {
            let event = self.dice.of(&self.past);
            // Only what is really of an earlier try; the same report twice does not happen.
            if event.run().is_some_and(|(index, generation)| self.sim.generation(index) != generation) {
                let effects = self.sim.step(event);
                self.perform(effects);
            }
        }
    }

    fn change(&mut self) {
        let image = self.dice.of(&["app:1", "app:2"]).to_owned();
        let effects = if self.dice.one_in(2) {
            self.image_changed = true;
            self.sim.change(|pod| pod.spec.as_mut().unwrap().containers[0].image = Some(image))
        } else if self.dice.one_in(4) {
            self.phase = self.phase.max(if self.phase < 2 { 3 } else { 0 });
            self.sim.change(|pod| {
                if !is_finished(pod) {
                    pod.status.get_or_insert_default().phase = Some("Failed".into());
                }
            })
        } else {
            self.sim.change(|pod| pod.spec.as_mut().unwrap().active_deadline_seconds = Some(500))
        };
        self.perform(effects);
    }

    fn delete(&mut self, grace: i64) {
        let effects = self.sim.delete(grace);
        self.perform(effects);
    }

    /// The agent dies, and what it ran with it; the next one begins.
    fn crash(&mut self) {
        for place in &mut self.places {
            *place = Place { launches: place.launches, ..Place::default() };
        }
        self.writing = None;
        self.deleting = false;
        self.refreshing = false;
        self.past.clear();
        // The next agent knows what arrived.
        let shown = self.sim.object.status.as_ref().and_then(|status| status.phase.clone());
        self.phase = rank(shown.as_deref().unwrap_or("Pending"));
        self.sim.done.clear();
        self.sim.restart_agent();
        let begun = std::mem::take(&mut self.sim.done);
        self.perform(begun);
    }

    /// Everything goes well from now on, and the pod is deleted.
    fn finish(&mut self) {
        if self.sim.life.shutdown {
            self.crash();
        }
        self.delete(2);
        for _ in 0..100 {
            if self.sim.life.is_done() {
                return;
            }
            for index in 0..self.places.len() {
                self.end(index, true);
            }
            if let Some(status) = self.writing.take() {
                self.sim.object.status = Some((*status).clone());
                self.step(Event::Written { status, result: Ok(u64::MAX) });
            }
            if std::mem::take(&mut self.deleting) {
                self.step(Event::Deleted(Ok(())));
                self.step(Event::Gone);
            }
            self.sim.now.at += Duration::from_secs(10);
            self.sim.now.time += jiff::SignedDuration::from_secs(10);
            self.step(Event::Tick);
        }
        panic!("a deleted pod does not end");
    }
}

fn any_spec(dice: &mut Dice) -> (Value, Vec<GuestKind>) {
    let mut kinds = Vec::new();
    let policy = dice.of(&["Always", "OnFailure", "Never"]);
    let mut init = Vec::new();
    for number in 0..dice.throw(3) {
        let sidecar = dice.one_in(2);
        kinds.push(if sidecar { dice.of(&[GuestKind::Server, GuestKind::Command]) } else { GuestKind::Command });
        let more = match (sidecar, dice.one_in(3)) {
            (true, true) => json!({"restartPolicy": "Always", "lifecycle": post_start()["lifecycle"]}),
            (true, false) => json!({"restartPolicy": "Always"}),
            (false, _) => json!({}),
        };
        init.push(container(&format!("init-{number}"), more));
    }
    let mut mains = Vec::new();
    for number in 0..=dice.throw(2) {
        kinds.push(dice.of(&[GuestKind::Server, GuestKind::Command]));
        let mut more = if dice.one_in(3) { post_start() } else { json!({}) };
        if dice.one_in(4) {
            more["restartPolicy"] = json!(dice.of(&["Always", "OnFailure", "Never"]));
            more["restartPolicyRules"] = json!([
                {"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}},
                {"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [88]}},
            ]);
        }
        if dice.one_in(3) {
            more["readinessProbe"] = json!({"tcpSocket": {"port": 1}});
        }
        mains.push(container(&format!("main-{number}"), more));
    }
    let volumes = if dice.one_in(2) { json!([{"name": "v", "emptyDir": {}}]) } else { json!([]) };
    (json!({"restartPolicy": policy, "initContainers": init, "containers": mains, "volumes": volumes}), kinds)
}

#[test]
fn whatever_happens_in_whatever_order_no_rule_is_broken() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = match number("KRUSTLET_MODEL_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("KRUSTLET_MODEL_SEEDS").unwrap_or(400),
    };
    for seed in seeds {
        let mut world = World::new(seed);
        for _ in 0..STEPS {
            if world.sim.life.is_done() {
                break;
            }
            world.happen();
        }
        world.finish();
    }
}
