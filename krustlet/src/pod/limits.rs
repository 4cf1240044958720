//! What a container may take: from its resources, its pod's, and the pod's annotations.

use super::annotation;
use super::fields::nanos;
use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use krustlet_runtime::ContainerSpec;
use std::time::Duration;

#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Bytes.
    pub memory: Option<u64>,
    /// Cores.
    pub cpu: Option<f64>,
    pub allowed_hosts: Vec<String>,
    pub request_timeout: Duration,
    pub stream_idle_timeout: Duration,
    pub max_concurrent_requests: usize,
    /// It takes nothing: its image is prepared, and it has completed.
    pub prepare_only: bool,
}

/// Containers of one pod, of every kind: each has a log, ports, an environment of its own.
const MAX_CONTAINERS: usize = 256;
/// Their volumeMounts together: each is a descriptor of the node's for as long as its container runs.
const MAX_MOUNTS: usize = 512;
/// Of one.
const NANO: u128 = 1_000_000_000;

/// A resource's limit in billionths. Zero is none, as in Kubernetes.
fn limit(resources: Option<&ResourceRequirements>, name: &str) -> Result<Option<u128>, String> {
    let limits = resources.and_then(|resources| resources.limits.as_ref());
    let Some(quantity) = limits.and_then(|limits| limits.get(name)) else {
        return Ok(None);
    };
    match nanos(quantity).map(u128::try_from) {
        Some(Ok(0)) => Ok(None),
        Some(Ok(amount)) => Ok(Some(amount)),
        _ => Err(format!("resources.limits.{name}: {:?} is not a quantity of zero or more", quantity.0)),
    }
}

fn tighter(a: Option<u128>, b: Option<u128>) -> Option<u128> {
    [a, b].into_iter().flatten().min()
}

impl Limits {
    pub fn of(pod: &Pod, container: &Container) -> Result<Self, String> {
        let annotation =
            |name: &str| pod.metadata.annotations.as_ref().and_then(|all| all.get(name)).map(|value| value.trim());
        let own = container.resources.as_ref();
        let of_pod = pod.spec.as_ref().and_then(|spec| spec.resources.as_ref());
        let memory = tighter(limit(own, "memory")?, limit(of_pod, "memory")?);
        let cpu = tighter(limit(own, "cpu")?, limit(of_pod, "cpu")?);
        // A part of a byte is a byte, as in Kubernetes.
        let memory = memory.map(|nanos| u64::try_from(nanos.div_ceil(NANO)).unwrap_or(u64::MAX));
        #[allow(clippy::cast_precision_loss)]
        let cpu = cpu.map(|nanos| nanos as f64 / NANO as f64);
        let allowed_hosts = annotation(annotation::ALLOWED_HOSTS)
            .map(|hosts| hosts.split(',').map(|host| host.trim().to_owned()).filter(|host| !host.is_empty()).collect())
            .unwrap_or_default();
        let timeout = |name: &str, default: Duration| match annotation(name) {
            None => Ok(default),
            Some(text) => duration(text)
                .ok_or_else(|| format!("annotation {name}: {text:?} is not a duration such as 30s, 500ms or 2m")),
        };
        let request_timeout = timeout(annotation::REQUEST_TIMEOUT, ContainerSpec::DEFAULT_REQUEST_TIMEOUT)?;
        let stream_idle_timeout = timeout(annotation::STREAM_IDLE_TIMEOUT, ContainerSpec::DEFAULT_STREAM_IDLE_TIMEOUT)?;
        let max_concurrent_requests = match annotation(annotation::MAX_CONCURRENT_REQUESTS) {
            None => ContainerSpec::DEFAULT_MAX_CONCURRENT_REQUESTS,
            Some(text) => text.parse().ok().filter(|number| *number > 0).ok_or_else(|| {
                format!("annotation {}: {text:?} is not a positive number", annotation::MAX_CONCURRENT_REQUESTS)
            })?,
        };
        let prepare_only = match annotation(annotation::PREPARE_ONLY) {
            None => false,
            Some(text) => text
                .parse()
                .map_err(|_| format!("annotation {}: {text:?} is neither true nor false", annotation::PREPARE_ONLY))?,
        };
        Ok(Self {
            memory,
            cpu,
            allowed_hosts,
            request_timeout,
            stream_idle_timeout,
            max_concurrent_requests,
            prepare_only,
        })
    }
}

/// Refuses a pod that has more than a node keeps of anything for one.
pub fn check_counts(pod: &Pod) -> Result<(), String> {
    let containers = || pod.spec.iter().flat_map(super::containers);
    let mounts: usize = containers().map(|(_, container)| container.volume_mounts.iter().flatten().count()).sum();
    for (count, most, what) in
        [(containers().count(), MAX_CONTAINERS, "containers"), (mounts, MAX_MOUNTS, "volumeMounts")]
    {
        if count > most {
            return Err(format!("a pod may have {most} {what}, not {count}"));
        }
    }
    Ok(())
}

/// Bytes that the containers of a pod may take together: its own limit, or what its containers' limits come to. Those that
/// have none share one container's default.
pub fn pod_memory(pod: &Pod, default: u64) -> u64 {
    let Some(spec) = &pod.spec else { return default };
    let bytes = |resources: &Option<ResourceRequirements>| {
        let quantity = resources.as_ref()?.limits.as_ref()?.get("memory")?;
        u64::try_from(nanos(quantity)? / 1_000_000_000).ok().filter(|bytes| *bytes > 0)
    };
    if let Some(limit) = bytes(&spec.resources) {
        return limit;
    }
    let limits: Vec<_> = super::containers(spec).map(|(_, container)| bytes(&container.resources)).collect();
    let unlimited = if limits.contains(&None) { default } else { 0 };
    limits.into_iter().flatten().fold(unlimited, u64::saturating_add)
}

/// A positive duration as Go writes it: numbers with units, such as `1m30s`, `500ms` or `1.5h`. None where it is no such, or
/// longer than Go's longest (292 years).
///
/// kube's own type for it panics where a number is too large.
pub fn duration(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut total: u128 = 0;
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (whole, fraction) = match rest[..number].split_once('.') {
            None => (&rest[..number], ""),
            Some((whole, fraction)) => (whole, fraction),
        };
        if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
            return None;
        }
        rest = &rest[number..];
        let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let nanos: u128 = match &rest[..unit] {
            "ns" => 1,
            // The micro sign, and the Greek letter.
            "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        rest = &rest[unit..];
        // No limit of Go's is above these digits, and no unit's part below them.
        let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        let digits: String = fraction.chars().take(15).collect();
        let scale = 10_u128.pow(u32::try_from(digits.len()).ok()?);
        let fraction: u128 = if digits.is_empty() { 0 } else { digits.parse().ok()? };
        let part = whole.checked_mul(nanos)?.checked_add(fraction * nanos / scale)?;
        total = total.checked_add(part).filter(|total| *total <= i64::MAX as u128)?;
    }
    Some(Duration::from_nanos(u64::try_from(total).ok()?)).filter(|duration| !duration.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::PodSpec;
    use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
    use std::collections::BTreeMap;

    fn pod(annotations: &[(&str, &str)]) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.annotations =
            Some(annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect());
        pod
    }

    fn container(limits: &[(&str, &str)]) -> Container {
        let limits: BTreeMap<_, _> =
            limits.iter().map(|(key, value)| ((*key).to_owned(), Quantity((*value).to_owned()))).collect();
        Container {
            resources: Some(ResourceRequirements { limits: Some(limits), ..ResourceRequirements::default() }),
            ..Container::default()
        }
    }

    #[test]
    fn a_pods_memory_is_its_own_limit_or_what_those_of_its_containers_come_to() {
        let pod = |text: &str| -> Pod { serde_json::from_str(text).unwrap() };
        let limited = |limits: [&str; 2]| {
            let [one, two] = limits.map(|limit| match limit {
                "" => r#"{"name": "c"}"#.to_owned(),
                limit => format!(r#"{{"name": "c", "resources": {{"limits": {{"memory": "{limit}"}}}}}}"#),
            });
            format!(r#""initContainers": [{one}], "containers": [{two}]"#)
        };
        let spec = |inner: &str| pod(&format!(r#"{{"spec": {{{inner}}}}}"#));
        assert_eq!(pod_memory(&spec(&limited(["1Mi", "2Mi"])), 7), 3 << 20);
        assert_eq!(pod_memory(&spec(&limited(["1Mi", ""])), 7), (1 << 20) + 7);
        assert_eq!(pod_memory(&spec(&limited(["", ""])), 7), 7);
        let level = r#""resources": {"limits": {"memory": "5Mi"}}"#;
        assert_eq!(pod_memory(&spec(&format!("{level}, {}", limited(["", "9Mi"]))), 7), 5 << 20);
    }

    #[test]
    fn a_pod_has_so_many_containers_and_mounts_and_no_more() {
        let checked = |containers: usize, mounts: usize| {
            let mount = serde_json::json!({"name": "v", "mountPath": "/v"});
            let container = serde_json::json!({"name": "c", "volumeMounts": vec![mount; mounts]});
            let all = vec![container; containers];
            let (init, main) = all.split_at(containers / 2);
            let pod = serde_json::json!({"spec": {"initContainers": init, "containers": main}});
            check_counts(&serde_json::from_value(pod).unwrap())
        };
        assert_eq!(checked(256, 2), Ok(()));
        assert_eq!(checked(257, 0), Err("a pod may have 256 containers, not 257".to_owned()));
        assert_eq!(checked(4, 129), Err("a pod may have 512 volumeMounts, not 516".to_owned()));
    }

    #[test]
    fn limits_come_from_resources_and_annotations() {
        let limits = Limits::of(
            &pod(&[
                (annotation::ALLOWED_HOSTS, "a.example, b.example:8080"),
                (annotation::REQUEST_TIMEOUT, "500ms"),
                (annotation::MAX_CONCURRENT_REQUESTS, "7"),
            ]),
            &container(&[("memory", "64Mi"), ("cpu", "250m")]),
        )
        .unwrap();
        assert_eq!(limits.memory, Some(64 << 20));
        assert_eq!(limits.cpu, Some(0.25));
        assert_eq!(limits.allowed_hosts, ["a.example", "b.example:8080"]);
        assert_eq!(limits.request_timeout, Duration::from_millis(500));
        assert_eq!(limits.max_concurrent_requests, 7);
    }

    #[test]
    fn a_pod_that_asks_for_nothing_gets_the_defaults_and_no_hosts() {
        let limits = Limits::of(&Pod::default(), &Container::default()).unwrap();
        assert_eq!((limits.memory, limits.cpu), (None, None));
        assert!(limits.allowed_hosts.is_empty());
        assert_eq!(limits.request_timeout, ContainerSpec::DEFAULT_REQUEST_TIMEOUT);
    }

    #[test]
    fn a_wrong_annotation_is_named() {
        let error = Limits::of(&pod(&[(annotation::REQUEST_TIMEOUT, "soon")]), &Container::default()).unwrap_err();
        assert!(error.contains(annotation::REQUEST_TIMEOUT) && error.contains("soon"), "{error}");
        assert!(Limits::of(&pod(&[(annotation::MAX_CONCURRENT_REQUESTS, "0")]), &Container::default()).is_err());
        assert!(Limits::of(&pod(&[(annotation::PREPARE_ONLY, "True")]), &Container::default()).is_err());
    }

    #[test]
    fn a_limit_of_zero_is_none_and_a_negative_one_is_refused() {
        let zero = Limits::of(&Pod::default(), &container(&[("memory", "0"), ("cpu", "0")])).unwrap();
        assert_eq!((zero.memory, zero.cpu), (None, None));
        let zero = Limits::of(&Pod::default(), &container(&[("memory", "0Gi"), ("cpu", "0m")])).unwrap();
        assert_eq!((zero.memory, zero.cpu), (None, None));
        for (name, wrong) in [("cpu", "-1"), ("memory", "-1Mi"), ("memory", "much")] {
            let error = Limits::of(&Pod::default(), &container(&[(name, wrong)])).unwrap_err();
            assert!(error.contains(name) && error.contains(wrong), "{error}");
        }
        let small = Limits::of(&Pod::default(), &container(&[("memory", "100m"), ("cpu", "1n")])).unwrap();
        assert_eq!((small.memory, small.cpu), (Some(1), Some(1e-9)), "a limit, however small");
    }

    #[test]
    fn no_container_has_more_than_its_pod() {
        let mut pod = Pod::default();
        let resources = container(&[("memory", "64Mi"), ("cpu", "500m")]).resources;
        pod.spec = Some(PodSpec { resources, ..PodSpec::default() });
        let limits = |own: &[(&str, &str)]| {
            let limits = Limits::of(&pod, &container(own)).unwrap();
            (limits.memory, limits.cpu)
        };
        assert_eq!(limits(&[]), (Some(64 << 20), Some(0.5)));
        assert_eq!(limits(&[("memory", "32Mi"), ("cpu", "0.2")]), (Some(32 << 20), Some(0.2)));
        assert_eq!(limits(&[("memory", "128Mi"), ("cpu", "2")]), (Some(64 << 20), Some(0.5)));
    }

    #[test]
    fn durations_are_gos() {
        for (text, expected) in [
            ("1.5s", Duration::from_millis(1500)),
            ("2m", Duration::from_secs(120)),
            ("1m30s", Duration::from_secs(90)),
            ("+1h0m0.5s", Duration::from_millis(3_600_500)),
            (".5s", Duration::from_millis(500)),
            ("5.s", Duration::from_secs(5)),
            ("1us", Duration::from_micros(1)),
            ("1\u{b5}s1\u{3bc}s", Duration::from_micros(2)),
            ("1.00000000000000000001ns", Duration::from_nanos(1)),
            ("2562047h47m16.854775807s", Duration::from_nanos(i64::MAX as u64)),
        ] {
            assert_eq!(duration(text), Some(expected), "{text}");
        }
        let long = format!("{}h", "9".repeat(400));
        for wrong in [
            "30",
            "s",
            "",
            "0",
            "0s",
            "-1s",
            "1d",
            "1S",
            "1 s",
            "1s ",
            "1m-30s",
            "1..5s",
            ".s",
            "1e3s",
            "infs",
            "+-1s",
            "++1s",
            "1m30",
            "2562047h47m16.854775808s",
            "\u{661}s",
            &long,
        ] {
            assert_eq!(duration(wrong), None, "{wrong}");
        }
    }

    /// Any text of Go's grammar, and what it means; a text of the same letters that is not of it means nothing, which is
    /// told by reading it once more with a grammar that is written otherwise.
    #[test]
    fn any_duration_of_gos_grammar_is_read_and_no_other() {
        let units = [("ns", 1_u64), ("us", 1_000), ("ms", 1_000_000), ("s", NANO as u64), ("m", 60 * NANO as u64)];
        for _ in 0..2000 {
            let mut text = String::new();
            let mut nanos = 0;
            for _ in 0..rand::random_range(1..5) {
                let (unit, scale) = units[rand::random_range(0..units.len())];
                let (whole, tenths) = (rand::random_range(0..1000_u64), rand::random_range(0..10_u64));
                text += &format!("{whole}.{tenths}{unit}");
                nanos += whole * scale + tenths * scale / 10;
            }
            assert_eq!(duration(&text), Some(Duration::from_nanos(nanos)).filter(|d| !d.is_zero()), "{text}");
        }
        let letters = ["1", "0", ".", "s", "m", "h", "ms", "d", "u", "-", "+", " ", "\u{b5}"];
        for _ in 0..20_000 {
            let text: String =
                (0..rand::random_range(0..7)).map(|_| letters[rand::random_range(0..letters.len())]).collect();
            let zero = text.chars().all(|c| !('1'..='9').contains(&c));
            assert_eq!(duration(&text).is_some(), is_of_the_grammar(&text) && !zero, "{text:?}");
        }
    }

    /// `[+]?([0-9]*(\.[0-9]*)?UNIT)+` with a digit in each number.
    fn is_of_the_grammar(text: &str) -> bool {
        fn parts(text: &str) -> bool {
            text.is_empty()
                || (1..=text.len())
                    .filter(|end| text.is_char_boundary(*end))
                    .any(|end| part(&text[..end]) && parts(&text[end..]))
        }
        fn part(text: &str) -> bool {
            ["ns", "us", "\u{b5}s", "ms", "s", "m", "h"].iter().any(|unit| {
                text.strip_suffix(unit).is_some_and(|number| {
                    number.bytes().all(|c| c.is_ascii_digit() || c == b'.')
                        && number.bytes().any(|c| c.is_ascii_digit())
                        && number.bytes().filter(|c| *c == b'.').count() < 2
                })
            })
        }
        let text = text.strip_prefix('+').unwrap_or(text);
        !text.is_empty() && parts(text)
    }
}
