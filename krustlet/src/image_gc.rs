//! Keeps images from filling the disk, with the kubelet's thresholds: above the high one, images that no pod uses are removed
//! until the disk is filled no more than up to the low one.

use crate::disk::{Disk, Figures};
use crate::events::{Recorder, Severity};
use crate::pod::{containers, is_finished};
use crate::reasons::event;
use crate::view::View;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use krustlet_runtime::{Freed, Runtime};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tracing::info;

/// The kubelet's own period.
const PERIOD: Duration = Duration::from_secs(300);

/// In percent of the disk that the data directory is on.
#[derive(Debug, Clone, Copy)]
pub struct Thresholds {
    pub high: u8,
    pub low: u8,
}

impl Thresholds {
    /// How many bytes are to be freed on a disk of this size; none while it is filled less than up to the high threshold.
    fn excess(self, total: u64, available: u64) -> Option<u64> {
        let filled = |percent: u8| u64::try_from(u128::from(total) * u128::from(percent) / 100).unwrap_or(u64::MAX);
        let used = total.saturating_sub(available);
        (total > 0 && used >= filled(self.high)).then(|| used.saturating_sub(filled(self.low)))
    }
}

pub struct ImageGc {
    pub runtime: Runtime,
    pub pods: Arc<dyn View>,
    pub data_dir: PathBuf,
    pub disk: Disk,
    pub thresholds: Thresholds,
    pub events: Recorder,
    pub node: ObjectReference,
}

impl ImageGc {
    pub async fn run(&self) {
        loop {
            self.collect().await;
            tokio::time::sleep(PERIOD).await;
        }
    }

    /// Removes every image that no pod uses.
    pub async fn remove_unused(&self) {
        self.free(u64::MAX).await;
    }

    async fn free(&self, bytes: u64) -> Freed {
        let in_use: Vec<String> = self.pods.pods().iter().flat_map(|pod| images(pod)).collect();
        let freed = self.runtime.free_disk(&in_use, bytes).await;
        if freed.images > 0 {
            info!("removed {} images that no pod uses, {} bytes", freed.images, freed.bytes);
        }
        freed
    }

    async fn collect(&self) {
        let Figures { total, available, .. } = self.disk.last();
        let Some(excess) = self.thresholds.excess(total, available) else { return };
        let freed = self.free(excess).await;
        if freed.bytes < excess {
            let message = format!(
                "The disk of {} is filled to {} %, and images that no pod uses take up no more of it; make room, or raise \
                 --image-gc-high-threshold ({} %)",
                self.data_dir.display(),
                (total - available) * 100 / total,
                self.thresholds.high,
            );
            self.events.record(self.node.clone(), Severity::Warning, event::FREE_DISK_SPACE_FAILED, message);
        }
    }
}

/// The images of a pod that has not ended: those that its containers are to have, and those that they run.
fn images(pod: &Pod) -> Vec<String> {
    if is_finished(pod) {
        return Vec::new();
    }
    let wanted = pod.spec.iter().flat_map(containers).filter_map(|(_, container)| container.image.clone());
    let status = pod.status.iter();
    let running = status
        .flat_map(|status| status.init_container_statuses.iter().chain(&status.container_statuses).flatten())
        .map(|container| container.image_id.clone());
    wanted.chain(running).filter(|name| !name.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn nothing_is_removed_below_the_high_threshold_and_above_it_down_to_the_low_one() {
        let thresholds = Thresholds { high: 85, low: 80 };
        assert_eq!(thresholds.excess(1000, 151), None);
        assert_eq!(thresholds.excess(1000, 150), Some(50));
        assert_eq!(thresholds.excess(1000, 0), Some(200));
        assert_eq!(thresholds.excess(0, 0), None, "a disk that cannot be measured");
    }

    #[test]
    fn an_image_is_in_use_if_a_pod_wants_or_runs_it() {
        let pod = |phase: &str| -> Pod {
            serde_json::from_value(json!({
                "metadata": {},
                "spec": {"initContainers": [{"name": "i", "image": "init:1"}], "containers": [{"name": "c", "image": "app:2"}]},
                "status": {"phase": phase, "containerStatuses": [{
                    "name": "c", "image": "app:1", "imageID": "app@sha256:1", "ready": true, "restartCount": 0,
                }]},
            }))
            .unwrap()
        };
        assert_eq!(images(&pod("Running")), ["init:1", "app:2", "app@sha256:1"]);
        assert!(images(&pod("Succeeded")).is_empty());
    }
}
