//! What a pod says of itself to its containers: fields of its object, resources, where it runs. The rules are the kubelet's.

use super::sources::ConfigError;
use k8s_openapi::api::core::v1::{Container, ObjectFieldSelector, Pod, ResourceFieldSelector, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use std::collections::BTreeMap;

/// What a pod may learn about where it runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodFacts {
    pub node_name: String,
    pub host_ip: String,
    /// Empty as long as the pod has none.
    pub pod_ip: String,
    /// Thousandths of a core.
    pub allocatable_cpu_millis: u64,
    /// Bytes.
    pub allocatable_memory: u64,
}

/// The value of a field of the pod, as a variable or a downwardAPI file shows it.
pub fn field_value(field: &ObjectFieldSelector, pod: &Pod, facts: &PodFacts) -> Result<String, ConfigError> {
    let path = field.field_path.as_str();
    let unsupported = || ConfigError::Invalid(format!("fieldRef {path:?} is not supported"));
    if !matches!(field.api_version.as_deref(), None | Some("" | "v1")) {
        return Err(unsupported());
    }
    let metadata = &pod.metadata;
    let spec = pod.spec.as_ref();
    if let Some((map, key)) = path.strip_suffix("']").and_then(|start| start.split_once("['")) {
        let map = match map {
            "metadata.labels" => &metadata.labels,
            "metadata.annotations" => &metadata.annotations,
            _ => return Err(unsupported()),
        };
        return Ok(map.as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default());
    }
    match path {
        "metadata.name" => Ok(metadata.name.clone().unwrap_or_default()),
        "metadata.namespace" => Ok(metadata.namespace.clone().unwrap_or_default()),
        "metadata.uid" => Ok(metadata.uid.clone().unwrap_or_default()),
        "metadata.labels" => Ok(format_map(metadata.labels.as_ref())),
        "metadata.annotations" => Ok(format_map(metadata.annotations.as_ref())),
        "spec.nodeName" => Ok(facts.node_name.clone()),
        "spec.serviceAccountName" => Ok(spec.and_then(|s| s.service_account_name.clone()).unwrap_or_default()),
        "status.hostIP" | "status.hostIPs" => Ok(facts.host_ip.clone()),
        "status.podIP" | "status.podIPs" => Ok(facts.pod_ip.clone()),
        _ => Err(unsupported()),
    }
}

/// `key="value"` lines in the order of the keys, the values quoted as Go quotes them.
fn format_map(map: Option<&BTreeMap<String, String>>) -> String {
    let lines: Vec<String> =
        map.into_iter().flatten().map(|(key, value)| format!("{key}={}", go_quote(value))).collect();
    lines.join("\n")
}

fn go_quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{b}' => out.push_str("\\v"),
            '\u{c}' => out.push_str("\\f"),
            c if c.is_ascii_control() => out.push_str(&format!("\\x{:02x}", c as u32)),
            c if c.is_control() || (c.is_whitespace() && c != ' ') => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// A container's limit or request in units of the divisor, rounded up. A limit that is not set is the pod's, then what
/// the node has to give; a request that is not set is 0.
pub fn resource_value(
    selector: &ResourceFieldSelector,
    pod: &Pod,
    container: Option<&Container>,
    facts: &PodFacts,
) -> Result<String, ConfigError> {
    let invalid = |what: &str| ConfigError::Invalid(format!("resourceFieldRef {:?}: {what}", selector.resource));
    let spec = pod.spec.as_ref();
    let container = match selector.container_name.as_deref().filter(|name| !name.is_empty()) {
        None => container.ok_or_else(|| invalid("names no container"))?,
        Some(name) => spec
            .into_iter()
            .flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()))
            .find(|container| container.name == name)
            .ok_or_else(|| invalid(&format!("the pod has no container {name:?}")))?,
    };
    let Some((kind, resource)) = selector.resource.split_once('.') else {
        return Err(invalid("is not supported"));
    };
    // The kubelet counts CPU in thousandths and everything else in whole units before it divides.
    let unit = match resource {
        "cpu" => NANO / 1000,
        "memory" | "ephemeral-storage" => NANO,
        _ => return Err(invalid("is not supported")),
    };
    let given = |resources: Option<&ResourceRequirements>| {
        let list = match kind {
            "limits" => resources?.limits.as_ref(),
            _ => resources?.requests.as_ref(),
        };
        let quantity = list?.get(resource)?;
        Some(nanos(quantity).ok_or_else(|| invalid(&format!("{:?} is no quantity", quantity.0))))
    };
    let own = given(container.resources.as_ref()).transpose()?.filter(|value| *value != 0);
    let value = match (kind, own) {
        (_, Some(value)) => value,
        ("requests", None) => 0,
        ("limits", None) => match given(spec.and_then(|spec| spec.resources.as_ref())).transpose()? {
            Some(value) if value != 0 => value,
            _ => match resource {
                "cpu" => i128::from(facts.allocatable_cpu_millis) * unit,
                "memory" => i128::from(facts.allocatable_memory) * unit,
                _ => 0,
            },
        },
        _ => return Err(invalid("is not supported")),
    };
    let divisor = match &selector.divisor {
        Some(divisor) => nanos(divisor).ok_or_else(|| invalid("the divisor is no quantity"))?,
        None => 0,
    };
    let divisor = if divisor == 0 { NANO } else { divisor };
    Ok(ceiling(ceiling(value, unit), ceiling(divisor, unit)).to_string())
}

fn ceiling(value: i128, by: i128) -> i128 {
    value / by + i128::from(value % by > 0)
}

const NANO: i128 = 1_000_000_000;

/// A quantity in units of 10⁻⁹, rounded up (`"100m"` is 100 million), or None when it is none or out of range.
pub fn nanos(quantity: &Quantity) -> Option<i128> {
    let text = quantity.0.trim();
    let digits = text.find(|c: char| !matches!(c, '0'..='9' | '.' | '+' | '-')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let (power, base): (i32, i128) = match suffix {
        "n" => (-9, 10),
        "u" => (-6, 10),
        "m" => (-3, 10),
        "" => (0, 10),
        "k" => (3, 10),
        "M" => (6, 10),
        "G" => (9, 10),
        "T" => (12, 10),
        "P" => (15, 10),
        "E" => (18, 10),
        "Ki" => (1, 1024),
        "Mi" => (2, 1024),
        "Gi" => (3, 1024),
        "Ti" => (4, 1024),
        "Pi" => (5, 1024),
        "Ei" => (6, 1024),
        exponent => (exponent.strip_prefix(['e', 'E'])?.parse().ok()?, 10),
    };
    let (negative, number) = match number.strip_prefix('-') {
        Some(number) => (true, number),
        None => (false, number.strip_prefix('+').unwrap_or(number)),
    };
    if number.contains(['+', '-']) {
        return None;
    }
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let mantissa: i128 = format!("{whole}{fraction}").parse().ok()?;
    let scaled = |value: i128, power: u32, base: i128| value.checked_mul(base.checked_pow(power)?);
    let (mut value, mut shift) = (mantissa, 9 - i32::try_from(fraction.len()).ok()?);
    if base == 1024 {
        value = scaled(value, u32::try_from(power).ok()?, 1024)?;
    } else {
        shift = shift.checked_add(power)?;
    }
    let value = match u32::try_from(shift) {
        Ok(shift) => scaled(value, shift, 10)?,
        Err(_) => ceiling(value, 10_i128.checked_pow(shift.unsigned_abs())?),
    };
    Some(if negative { -value } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_in_every_spelling() {
        for (text, expected) in [
            ("1", Some(NANO)),
            ("100m", Some(NANO / 10)),
            ("1.5", Some(NANO * 3 / 2)),
            (".5Ki", Some(512 * NANO)),
            ("2e3", Some(2000 * NANO)),
            ("1E", Some(1_000_000_000_000_000_000 * NANO)),
            ("-1n", Some(-1)),
            ("0.1n", Some(1)),
            ("7Ei", Some((7 << 60) * NANO)),
            ("", None),
            ("1Q", None),
            ("1e99", None),
            ("99999999999999999999999999999999999999999", None),
            ("--1", None),
        ] {
            assert_eq!(nanos(&Quantity(text.into())), expected, "{text}");
        }
    }
}
