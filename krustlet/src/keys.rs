//! The keys that may sign modules, taken anew when their files change: pods that run go on, and whatever starts from then on is
//! judged by the new ones.

use crate::cli::Options;
use crate::events::{Recorder, Severity};
use crate::reasons::event;
use k8s_openapi::api::core::v1::ObjectReference;
use krustlet_runtime::{Runtime, Verification};
use std::time::Duration;
use tokio::sync::watch;
use tracing::{info, warn};

/// How often the files are looked at; they are some hundred bytes.
const LOOK: Duration = Duration::from_secs(1);

pub struct Keys {
    pub options: Options,
    pub runtime: Runtime,
    pub events: Recorder,
    pub node: ObjectReference,
    /// The fingerprint of those that are in force.
    pub told: watch::Sender<Option<String>>,
}

impl Keys {
    pub async fn follow(self) {
        let mut complained = String::new();
        loop {
            tokio::time::sleep(LOOK).await;
            let options = self.options.clone();
            // A file system that hangs holds up this task alone.
            let Ok(found) = tokio::task::spawn_blocking(move || options.verification()).await else { continue };
            let why = match found {
                Ok(found) => {
                    if found != *self.runtime.verification() {
                        self.take(found);
                    }
                    String::new()
                }
                Err(error) => format!("{error:#}; the keys of before stay in force"),
            };
            if !why.is_empty() && why != complained {
                warn!("{why}");
                self.record(Severity::Warning, event::VERIFICATION_KEYS_UNUSABLE, why.clone());
            }
            complained = why;
        }
    }

    /// Tells of them once they are in force, and not before.
    fn take(&self, verification: Verification) {
        let fingerprint = verification.fingerprint();
        self.runtime.verify_by(verification);
        let name = fingerprint.clone().unwrap_or_default();
        info!(keys = name, "modules are judged by other keys from now on");
        let message = format!("modules are judged by other keys from now on: {name}");
        self.record(Severity::Normal, event::VERIFICATION_KEYS_CHANGED, message);
        self.told.send_replace(fingerprint);
    }

    fn record(&self, severity: Severity, reason: &'static str, message: String) {
        self.events.record(self.node.clone(), severity, reason, message);
    }
}
