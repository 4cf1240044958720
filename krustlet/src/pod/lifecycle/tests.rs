//! The life of a pod, sentence by sentence.

use super::super::failure::Obstacle;
use super::super::guest::GuestKind::{Command, Server};
use super::super::probes::{ProbeEvent, ProbeKind};
use super::super::status;
use super::event::{Effect, Event};
use super::sim::{Sim, container, end, pod, post_start, seconds};
use crate::reasons::event as event_reason;
use serde_json::json;
use std::time::Duration;

fn stops(effects: &[Effect]) -> Vec<(usize, Duration)> {
    let stop = |effect: &Effect| match effect {
        Effect::Stop { index, grace, .. } => Some((*index, *grace)),
        _ => None,
    };
    effects.iter().filter_map(stop).collect()
}

fn exit_code(sim: &mut Sim, name: &str) -> Option<i32> {
    Some(sim.status_of(name).state?.terminated?.exit_code)
}

fn waiting_reason(sim: &mut Sim, name: &str) -> Option<String> {
    sim.status_of(name).state?.waiting?.reason
}

// Starting

#[test]
fn the_containers_of_a_pod_are_prepared_side_by_side() {
    let sim = Sim::new(json!({"containers": [container("a", json!({})), container("b", json!({}))]}));
    assert_eq!(Sim::prepares(&sim.done), [0, 1]);
}

#[test]
fn a_container_is_started_when_what_it_needs_is_there_and_the_pod_runs() {
    let mut sim = Sim::new(json!({}));
    assert_eq!(sim.phase(), "Pending");
    let effects = sim.prepared(0, Server);
    assert!(matches!(effects[..], [Effect::Launch { index: 0, attempt: 0, .. }]), "{effects:?}");
    let effects = sim.launched(0, Server);
    assert!(matches!(&effects[0], Effect::Remember { record, .. } if record.termination.is_none()), "{effects:?}");
    assert_eq!(sim.phase(), "Running");
    assert!(sim.status_of("main").ready);
}

#[test]
fn init_containers_run_one_after_the_other_and_the_others_after_them() {
    let mut sim = Sim::new(json!({
        "initContainers": [container("first", json!({})), container("second", json!({}))],
        "containers": [container("main", json!({}))],
    }));
    assert_eq!(Sim::prepares(&sim.done), [0]);
    assert_eq!(waiting_reason(&mut sim, "main").as_deref(), Some("PodInitializing"));
    sim.run(0, Command);
    assert_eq!(Sim::prepares(&sim.ended(0, 0)), [1]);
    sim.run(1, Command);
    assert_eq!(Sim::prepares(&sim.ended(1, 0)), [2]);
}

#[test]
fn a_sidecar_lets_the_next_begin_when_it_has_started_and_ends_last() {
    let sidecar = json!({"restartPolicy": "Always", "startupProbe": {"tcpSocket": {"port": 1}}});
    let mut sim = Sim::new(json!({
        "initContainers": [container("sidecar", sidecar)],
        "containers": [container("main", json!({}))],
        "restartPolicy": "Never",
    }));
    let effects = sim.run(0, Server);
    assert!(Sim::prepares(&effects).is_empty() && effects.iter().any(|e| matches!(e, Effect::Probe { index: 0, .. })));
    let generation = sim.generation(0);
    assert_eq!(Sim::prepares(&sim.step(Event::Probed { index: 0, generation, probe: ProbeEvent::Started })), [1]);
    sim.run(1, Command);
    assert_eq!(stops(&sim.ended(1, 0)), [(0, seconds(30))]);
    assert_eq!(sim.phase(), "Running");
    sim.ended(0, 0);
    assert_eq!(sim.phase(), "Succeeded");
}

#[test]
fn what_stands_in_the_way_is_tried_again_after_growing_waits() {
    let mut sim = Sim::new(json!({}));
    for wait in [1, 2, 4, 8, 10, 10] {
        sim.cannot_prepare(0, Obstacle::Port);
        assert!(Sim::prepares(&sim.pass(seconds(wait) - Duration::from_millis(1))).is_empty(), "{wait}");
        assert_eq!(Sim::prepares(&sim.pass(Duration::from_millis(1))), [0], "{wait}");
    }
    sim.cannot_prepare(0, Obstacle::Port);
    assert_eq!(Sim::prepares(&sim.step(Event::Released(Obstacle::Port))), [0], "at once when a port is free");
    assert_eq!(sim.restarts("main"), 0);
}

#[test]
fn a_failed_pull_shows_its_cause_and_then_that_the_next_try_is_waited_for() {
    let mut sim = Sim::new(json!({}));
    sim.cannot_prepare(0, Obstacle::Image);
    assert_eq!(waiting_reason(&mut sim, "main").as_deref(), Some("ErrImagePull"));
    sim.pass(seconds(2));
    assert_eq!(waiting_reason(&mut sim, "main").as_deref(), Some("ImagePullBackOff"));
}

#[test]
fn a_report_about_an_earlier_try_is_not_heard() {
    let mut sim = Sim::new(json!({}));
    let earlier = sim.generation(0);
    sim.change(|pod| pod.spec.as_mut().unwrap().containers[0].image = Some("app:2".into()));
    let late = Event::Prepared { index: 0, generation: earlier, result: Ok(Command), prepared: true };
    assert!(sim.step(late).iter().all(|effect| !matches!(effect, Effect::Launch { .. })));
}

// Ends and restarts

#[test]
fn under_never_an_end_is_the_end() {
    for (code, phase) in [(0, "Succeeded"), (3, "Failed")] {
        let mut sim = Sim::new(json!({"restartPolicy": "Never"}));
        sim.run(0, Command);
        assert!(Sim::prepares(&sim.ended(0, code)).is_empty());
        assert_eq!(sim.phase(), phase);
        assert!(sim.done.contains(&Effect::ReleasePorts { container: None }));
    }
}

#[test]
fn under_always_an_end_is_followed_by_a_start_at_once_and_then_after_growing_waits() {
    let mut sim = Sim::new(json!({}));
    sim.run(0, Command);
    assert_eq!(Sim::prepares(&sim.ended(0, 0)), [0]);
    for (restarts, wait) in [(1, 10), (2, 20), (3, 40)] {
        sim.run(0, Command);
        assert_eq!(sim.restarts("main"), restarts);
        assert!(Sim::prepares(&sim.ended(0, 1)).is_empty());
        assert_eq!(waiting_reason(&mut sim, "main").as_deref(), Some("CrashLoopBackOff"));
        assert_eq!(Sim::prepares(&sim.pass(seconds(wait))), [0]);
    }
    assert_eq!(sim.phase(), "Running");
}

#[test]
fn a_pod_whose_init_container_fails_for_good_fails_and_never_begins() {
    let mut sim = Sim::new(json!({
        "restartPolicy": "Never",
        "initContainers": [container("init", json!({}))],
        "containers": [container("main", json!({}))],
    }));
    sim.run(0, Command);
    assert!(Sim::prepares(&sim.ended(0, 1)).is_empty());
    assert_eq!(sim.phase(), "Failed");
}

#[test]
fn a_rule_restarts_what_its_policy_would_not() {
    let rules = json!([{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]);
    let mut sim = Sim::new(json!({
        "restartPolicy": "Never",
        "containers": [container("main", json!({"restartPolicy": "Never", "restartPolicyRules": rules}))],
    }));
    sim.run(0, Command);
    assert_eq!(Sim::prepares(&sim.ended(0, 42)), [0]);
    sim.run(0, Command);
    assert!(Sim::prepares(&sim.ended(0, 1)).is_empty());
    assert_eq!((sim.phase().as_str(), sim.restarts("main")), ("Failed", 1));
}

#[test]
fn a_rule_may_restart_all_containers_init_containers_first() {
    let rules = json!([{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [88]}}]);
    let mut sim = Sim::new(json!({
        "restartPolicy": "Never",
        "initContainers": [container("init", json!({})), container("side", json!({"restartPolicy": "Always"}))],
        "containers": [
            container("trigger", json!({"restartPolicy": "Never", "restartPolicyRules": rules})),
            container("other", json!({})),
        ],
    }));
    sim.run(0, Command);
    sim.ended(0, 0);
    sim.run(1, Server);
    sim.run(2, Command);
    sim.run(3, Server);
    assert_eq!(stops(&sim.ended(2, 88)), [(3, seconds(30))], "the sidecar after the others");
    assert_eq!(stops(&sim.ended(3, 0)), [(1, seconds(30))]);
    assert_eq!(Sim::prepares(&sim.ended(1, 0)), [0], "init containers first");
    sim.run(0, Command);
    assert_eq!(sim.phase(), "Running");
    assert_eq!(Sim::prepares(&sim.ended(0, 0)), [1]);
    assert_eq!(Sim::prepares(&sim.run(1, Server)), [2, 3]);
    sim.run(2, Command);
    sim.run(3, Server);
    for name in ["init", "side", "trigger", "other"] {
        assert_eq!(sim.restarts(name), 1, "{name}");
    }
    sim.ended(2, 0);
    sim.ended(3, 0);
    sim.ended(1, 0);
    assert_eq!(sim.phase(), "Succeeded");
}

// Hooks

#[test]
fn a_container_runs_when_its_post_start_hook_is_through() {
    let probed = json!({"readinessProbe": {"tcpSocket": {"port": 1}}, "lifecycle": post_start()["lifecycle"]});
    let mut sim = Sim::new(json!({"containers": [container("main", probed)]}));
    let effects = sim.run(0, Server);
    assert!(effects.iter().any(|effect| matches!(effect, Effect::PostStart { .. })));
    assert!(effects.iter().all(|effect| !matches!(effect, Effect::Probe { .. })));
    assert_eq!(sim.phase(), "Pending");
    let effects = sim.post_started(0, Ok(()));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Probe { .. })));
    assert_eq!(sim.phase(), "Running");
}

#[test]
fn under_never_a_failed_post_start_hook_fails_the_pod_and_the_command_runs_once() {
    for kind in [Command, Server] {
        let mut sim = Sim::new(json!({"restartPolicy": "Never", "containers": [container("main", post_start())]}));
        sim.run(0, kind);
        assert_eq!(stops(&sim.post_started(0, Err("answered 500"))), [(0, seconds(30))]);
        assert!(sim.told(event_reason::FAILED_POST_START_HOOK)[0].contains("answered 500"));
        assert!(Sim::prepares(&sim.ended(0, if kind == Command { 137 } else { 0 })).is_empty());
        assert_eq!((sim.phase().as_str(), exit_code(&mut sim, "main")), ("Failed", Some(137)), "{kind:?}");
        assert_eq!(sim.restarts("main"), 0);
    }
}

#[test]
fn a_failed_post_start_hook_is_a_restart_like_any_other() {
    for policy in ["OnFailure", "Always"] {
        let mut sim = Sim::new(json!({"restartPolicy": policy, "containers": [container("main", post_start())]}));
        sim.run(0, Server);
        sim.post_started(0, Err("no"));
        assert_eq!(Sim::prepares(&sim.ended(0, 0)), [0], "{policy}: the first time at once");
        sim.run(0, Server);
        sim.post_started(0, Err("no"));
        assert!(Sim::prepares(&sim.ended(0, 0)).is_empty(), "{policy}: then after a wait");
        assert_eq!(waiting_reason(&mut sim, "main").as_deref(), Some("CrashLoopBackOff"));
        assert_eq!(sim.restarts("main"), 1);
    }
}

#[test]
fn a_sidecar_whose_post_start_hook_fails_is_restarted_and_lets_nobody_begin() {
    let mut hook = post_start();
    hook["restartPolicy"] = json!("Always");
    let mut sim = Sim::new(json!({
        "restartPolicy": "Never",
        "initContainers": [container("side", hook)],
        "containers": [container("main", json!({}))],
    }));
    assert!(Sim::prepares(&sim.run(0, Server)).is_empty());
    sim.post_started(0, Err("no"));
    assert_eq!(Sim::prepares(&sim.ended(0, 0)), [0]);
    sim.run(0, Server);
    assert_eq!(Sim::prepares(&sim.post_started(0, Ok(()))), [1]);
}

#[test]
fn a_command_that_ends_during_its_post_start_hook_has_its_own_exit_code() {
    let mut sim = Sim::new(json!({"restartPolicy": "Never", "containers": [container("main", post_start())]}));
    sim.run(0, Command);
    let generation = sim.generation(0);
    sim.ended(0, 0);
    assert!(stops(&sim.step(Event::PostStarted { index: 0, generation, result: Err("late".into()) })).is_empty());
    assert_eq!(sim.phase(), "Succeeded");
}

#[test]
fn a_pod_that_is_deleted_during_a_post_start_hook_ends() {
    let mut sim = Sim::new(json!({"containers": [container("main", post_start())]}));
    sim.run(0, Server);
    assert_eq!(stops(&sim.delete(7)), [(0, seconds(7))]);
}

#[test]
fn a_failed_pre_stop_hook_is_told_and_changes_nothing() {
    let mut sim = Sim::new(json!({"restartPolicy": "Never"}));
    sim.run(0, Server);
    sim.delete(5);
    let generation = sim.generation(0);
    assert!(stops(&sim.step(Event::PreStopFailed { index: 0, generation, cause: "no".into() })).is_empty());
    assert_eq!(sim.told(event_reason::FAILED_PRE_STOP_HOOK).len(), 1);
}

// Probes

#[test]
fn a_container_that_its_probe_gives_up_is_stopped_with_the_probes_grace_and_restarted() {
    let probe = json!({"livenessProbe": {"tcpSocket": {"port": 1}, "terminationGracePeriodSeconds": 3}});
    let mut sim = Sim::new(json!({"containers": [container("main", probe)]}));
    sim.run(0, Server);
    let generation = sim.generation(0);
    let probe = ProbeEvent::Failed { kind: ProbeKind::Liveness, message: "failed liveness probe".into() };
    assert_eq!(stops(&sim.step(Event::Probed { index: 0, generation, probe })), [(0, seconds(3))]);
    assert_eq!(Sim::prepares(&sim.ended(0, 0)), [0]);
    let last = sim.status_of("main").state.unwrap().terminated.unwrap();
    assert_eq!((last.exit_code, last.message.as_deref()), (137, Some("failed liveness probe")));
}

#[test]
fn why_a_container_is_stopped_stays_when_its_pod_is_deleted_meanwhile() {
    let mut sim =
        Sim::new(json!({"containers": [container("main", json!({"livenessProbe": {"tcpSocket": {"port": 1}}}))]}));
    sim.run(0, Server);
    let generation = sim.generation(0);
    let probe = ProbeEvent::Failed { kind: ProbeKind::Liveness, message: "failed liveness probe".into() };
    sim.step(Event::Probed { index: 0, generation, probe });
    let effects = sim.delete(5);
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Hasten { index: 0, .. })), "{effects:?}");
    sim.ended(0, 0);
    assert_eq!(exit_code(&mut sim, "main"), Some(137));
}

// The end of the pod

#[test]
fn a_grace_period_beyond_the_clocks_range_is_a_long_one() {
    let probe = json!({"livenessProbe": {"tcpSocket": {"port": 1}, "terminationGracePeriodSeconds": i64::MAX}});
    let spec = json!({"containers": [container("main", probe)], "terminationGracePeriodSeconds": i64::MAX});
    let mut sim = Sim::new(spec.clone());
    sim.run(0, Server);
    let generation = sim.generation(0);
    let probe = ProbeEvent::Failed { kind: ProbeKind::Liveness, message: "failed liveness probe".into() };
    assert!(stops(&sim.step(Event::Probed { index: 0, generation, probe }))[0].1 > seconds(1 << 30));
    let mut sim = Sim::new(spec);
    sim.run(0, Server);
    assert!(stops(&sim.delete(i64::MAX))[0].1 > seconds(1 << 30));
    sim.delete(5);
    sim.ended(0, 0);
    assert_eq!(sim.phase(), "Succeeded");
}

#[test]
fn a_deleted_pod_is_told_as_ended_before_its_object_is_deleted() {
    let mut sim = Sim::new(json!({}));
    sim.run(0, Server);
    sim.publish();
    assert_eq!(stops(&sim.delete(60)), [(0, seconds(60))]);
    assert!(!sim.ended(0, 0).contains(&Effect::Delete));
    assert_eq!(sim.phase(), "Succeeded");
    assert!(sim.done.contains(&Effect::Delete));
    assert!(!sim.life.is_done());
    sim.step(Event::Gone);
    assert!(sim.life.is_done() && sim.life.is_gone());
}

#[test]
fn a_second_delete_may_shorten_the_time_and_never_lengthens_it() {
    let mut sim = Sim::new(json!({}));
    sim.run(0, Server);
    sim.delete(60);
    let until = sim.now.at + seconds(5);
    assert!(sim.delete(5).contains(&Effect::Hasten { index: 0, until }));
    assert!(!sim.delete(60).iter().any(|effect| matches!(effect, Effect::Hasten { .. })));
}

#[test]
fn a_pod_that_is_deleted_before_it_began_has_nothing_started() {
    let mut sim = Sim::new(json!({}));
    let earlier = sim.generation(0);
    assert!(sim.delete(30).contains(&Effect::Abandon { index: 0 }));
    let late = Event::Prepared { index: 0, generation: earlier, result: Ok(Server), prepared: true };
    assert!(sim.step(late).iter().all(|effect| !matches!(effect, Effect::Launch { .. })));
    assert_eq!(sim.phase(), "Failed");
}

#[test]
fn a_delete_that_fails_is_tried_again_and_one_that_finds_nothing_is_not() {
    let mut sim = Sim::new(json!({}));
    sim.delete(0);
    sim.publish();
    sim.step(Event::Deleted(Err(Some(500))));
    assert!(sim.pass(seconds(2)).contains(&Effect::Delete));
    sim.step(Event::Deleted(Err(Some(404))));
    assert!(!sim.pass(seconds(2)).contains(&Effect::Delete));
}

#[test]
fn a_pod_is_stopped_at_its_deadline() {
    let mut sim = Sim::new(json!({"activeDeadlineSeconds": 10}));
    sim.run(0, Command);
    assert!(stops(&sim.pass(seconds(9))).is_empty());
    assert_eq!(stops(&sim.pass(seconds(1))), [(0, seconds(30))]);
    sim.ended(0, 137);
    let status = sim.publish();
    assert_eq!((status.phase.as_deref(), status.reason.as_deref()), (Some("Failed"), Some("DeadlineExceeded")));
}

#[test]
fn a_pod_that_has_ended_is_not_woken_for_its_deadline_or_its_files() {
    let mut sim = Sim::new(json!({"restartPolicy": "Never", "activeDeadlineSeconds": 10}));
    sim.run(0, Command);
    sim.ended(0, 0);
    assert_eq!(sim.phase(), "Succeeded");
    sim.step(Event::Refreshed { error: None });
    assert_eq!(sim.life.deadline(), None);
    sim.restart_agent();
    sim.pass(seconds(60));
    assert_eq!(sim.life.deadline(), None);
}

#[test]
fn a_pod_that_takes_more_disk_than_it_may_is_evicted_once() {
    let mut sim = Sim::new(json!({}));
    sim.run(0, Server);
    let over = || Event::Evicted("too much".into());
    assert_eq!(stops(&sim.step(over())), [(0, seconds(1))]);
    assert!(stops(&sim.step(over())).is_empty());
    sim.ended(0, 0);
    let status = sim.publish();
    assert_eq!((status.phase.as_deref(), status.reason.as_deref()), (Some("Failed"), Some("Evicted")));
    assert!(status.conditions.unwrap().iter().any(|c| c.type_ == "DisruptionTarget" && c.status == "True"));
    assert_eq!(sim.told("Evicted").len(), 1);
}

#[test]
fn a_pod_that_the_node_cannot_take_fails_with_nothing_started() {
    let spec = json!({"containers": [container("main", json!({}))]});
    let rejected = status::Failure { reason: "OutOfpods".into(), message: "full".into() };
    let mut sim = Sim::of(pod(spec), Some(rejected));
    assert!(Sim::prepares(&sim.done).is_empty());
    assert_eq!(sim.publish().reason.as_deref(), Some("OutOfpods"));
}

#[test]
fn a_pod_that_another_hand_ended_is_ended_here() {
    let mut sim = Sim::new(json!({}));
    sim.run(0, Server);
    sim.publish();
    let effects = sim.change(|pod| pod.status.get_or_insert_default().phase = Some("Failed".into()));
    assert_eq!(stops(&effects).len(), 1);
}

#[test]
fn the_guests_of_a_pod_whose_object_is_gone_have_the_least_time() {
    let mut sim = Sim::new(json!({}));
    sim.run(0, Server);
    assert_eq!(stops(&sim.step(Event::Gone)), [(0, seconds(2))]);
    sim.ended(0, 0);
    assert!(sim.life.is_done());
}

// A new image

#[test]
fn a_server_is_brought_to_its_new_image_while_it_serves() {
    let mut sim = Sim::new(json!({}));
    sim.run(0, Server);
    let effects = sim.change(|pod| pod.spec.as_mut().unwrap().containers[0].image = Some("app:2".into()));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Swap { index: 0, .. })));
    let generation = sim.generation(0);
    sim.step(Event::Swapped { index: 0, generation, result: Ok("app@sha256:2".into()) });
    let status = sim.status_of("main");
    assert_eq!((status.image_id.as_str(), status.restart_count, status.ready), ("app@sha256:2", 0, true));
}

#[test]
fn a_change_of_the_image_that_is_taken_back_is_given_up() {
    let mut sim = Sim::new(json!({}));
    sim.run(0, Server);
    sim.change(|pod| pod.spec.as_mut().unwrap().containers[0].image = Some("app:2".into()));
    let effects = sim.change(|pod| pod.spec.as_mut().unwrap().containers[0].image = Some("app:1".into()));
    assert!(effects.contains(&Effect::AbandonSwap { index: 0 }));
}

#[test]
fn a_command_is_restarted_for_its_new_image_without_a_wait_whatever_its_policy() {
    let mut sim = Sim::new(json!({"restartPolicy": "Never"}));
    sim.run(0, Command);
    let effects = sim.change(|pod| pod.spec.as_mut().unwrap().containers[0].image = Some("app:2".into()));
    assert_eq!(stops(&effects).len(), 1);
    assert_eq!(Sim::prepares(&sim.ended(0, 137)), [0]);
    sim.run(0, Command);
    assert_eq!(sim.restarts("main"), 1);
}

// The end of the agent, and the next one

#[test]
fn a_pod_is_let_go_with_the_agent_and_goes_on_with_the_next_one() {
    for kind in [Server, Command] {
        let mut sim = Sim::new(json!({}));
        sim.run(0, kind);
        sim.publish();
        assert_eq!(stops(&sim.step(Event::ShuttingDown)), [(0, seconds(20))]);
        sim.publish();
        sim.ended(0, if kind == Server { 0 } else { 137 });
        assert_eq!(sim.phase(), "Running");
        assert!(sim.life.is_done() && !sim.life.is_gone());
        sim.restart_agent();
        sim.run(0, kind);
        assert_eq!((sim.phase().as_str(), sim.restarts("main")), ("Running", 1), "{kind:?}");
    }
}

#[test]
fn a_command_that_may_run_once_is_not_run_again_by_the_next_agent() {
    let mut sim = Sim::new(json!({"restartPolicy": "Never"}));
    sim.run(0, Command);
    sim.publish();
    sim.restart_agent();
    assert!(sim.prepared(0, Command).iter().all(|effect| !matches!(effect, Effect::Launch { .. })));
    assert_eq!(sim.phase(), "Failed");
}

#[test]
fn a_server_that_may_run_once_serves_on_with_the_next_agent() {
    let mut sim = Sim::new(json!({"restartPolicy": "Never"}));
    sim.run(0, Server);
    sim.publish();
    sim.restart_agent();
    sim.run(0, Server);
    assert_eq!(sim.phase(), "Running");
}

#[test]
fn a_command_that_ended_by_itself_while_the_agent_stopped_has_ended() {
    let mut sim = Sim::new(json!({"restartPolicy": "Never"}));
    sim.run(0, Command);
    sim.publish();
    sim.step(Event::ShuttingDown);
    sim.ended(0, 0);
    sim.publish();
    sim.restart_agent();
    assert!(Sim::prepares(&sim.done[sim.done.len() - 2..]).is_empty());
    assert_eq!((sim.phase().as_str(), exit_code(&mut sim, "main")), ("Succeeded", Some(0)));
}

#[test]
fn a_command_whose_post_start_hook_was_under_way_when_the_agent_died_has_run_once() {
    let mut sim = Sim::new(json!({"restartPolicy": "Never", "containers": [container("main", post_start())]}));
    sim.run(0, Command);
    sim.restart_agent();
    assert!(sim.prepared(0, Command).iter().all(|effect| !matches!(effect, Effect::Launch { .. })));
    assert_eq!(sim.phase(), "Failed");
}

#[test]
fn an_agent_that_ends_waits_for_a_deleted_pod_and_only_so_long_for_its_object() {
    let mut sim = Sim::new(json!({}));
    sim.run(0, Server);
    sim.publish();
    sim.delete(10);
    sim.step(Event::ShuttingDown);
    assert!(!sim.life.is_done());
    sim.ended(0, 0);
    assert!(!sim.life.is_done());
    sim.pass(seconds(5));
    assert!(sim.life.is_done());
}

#[test]
fn the_end_of_a_log_is_told_where_the_container_asks_for_it() {
    let mut sim = Sim::new(json!({"restartPolicy": "Never"}));
    sim.run(0, Command);
    let generation = sim.generation(0);
    let mut failed = end(1);
    failed.last_words = "out of luck".into();
    sim.step(Event::Ended { index: 0, generation, end: failed });
    let message = sim.status_of("main").state.unwrap().terminated.unwrap().message;
    assert_eq!(message.as_deref(), Some("out of luck"));
}
