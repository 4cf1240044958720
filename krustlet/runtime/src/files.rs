//! Bounds the files that a guest has open: each is one of the node's file descriptors.

use crate::shares::{Share, Taken};
use std::fs::File;
use std::sync::{Arc, Weak};

/// The files that one instance has open.
pub struct OpenFiles {
    share: Arc<Share>,
    open: Vec<(Weak<File>, Taken)>,
    /// Those of a core module, whose own table nobody else can look into.
    unnamed: Vec<Taken>,
}

impl OpenFiles {
    pub fn new(share: Arc<Share>) -> Self {
        Self { share, open: Vec::new(), unnamed: Vec::new() }
    }

    /// One more file, None where its pod has no descriptor left.
    pub fn take(&mut self) -> Option<Taken> {
        // A stream may hold a file whose descriptor the guest has dropped.
        self.open.retain(|(file, _)| file.strong_count() > 0);
        self.share.take(1)
    }

    pub fn hold(&mut self, file: Weak<File>, taken: Taken) {
        self.open.push((file, taken));
    }

    pub fn hold_unnamed(&mut self, taken: Taken) {
        self.unnamed.push(taken);
    }

    pub fn close_unnamed(&mut self) {
        self.unnamed.pop();
    }
}
