//! Bounds what a guest makes the node hold by its files: those that it has open, each one of the node's file descriptors, and
//! lists of directories, of which WASI's implementation makes one whole before it gives the first entry.

use crate::memory::Reservation;
use crate::shares::Taken;
use crate::tenants::Tenant;
use rustix::fs::{Dir, Mode, OFlags, openat};
use std::fs::File;
use std::io;
use std::sync::{Arc, Weak};
use tokio::sync::OwnedSemaphorePermit;

/// What one list may take.
const MAX_LIST: u64 = 16 * 1024 * 1024;
/// What an entry takes beside its name.
const ENTRY: u64 = 128;

/// The files that one instance has open.
pub struct OpenFiles {
    tenant: Arc<Tenant>,
    open: Vec<(Weak<File>, Taken)>,
    /// What lists take, by their numbers in the instance's table.
    pub lists: Vec<(u32, Reservation)>,
}

impl OpenFiles {
    pub fn new(tenant: Arc<Tenant>) -> Self {
        Self { tenant, open: Vec::new(), lists: Vec::new() }
    }

    /// One more file, None where its pod has no descriptor left.
    pub fn take(&mut self) -> Option<Taken> {
        // A stream may hold a file whose descriptor the guest has dropped.
        self.open.retain(|(file, _)| file.strong_count() > 0);
        self.tenant.descriptors.take(1)
    }

    pub fn hold(&mut self, file: Weak<File>, taken: Taken) {
        self.open.push((file, taken));
    }

    /// Waits for the permit to list a directory, if it is one; gives what the list will take, None if that is too much.
    pub fn size_of_list(
        &self,
        directory: Option<Arc<File>>,
    ) -> impl Future<Output = io::Result<(Option<u64>, OwnedSemaphorePermit)>> + use<> {
        let listings = self.tenant.listings.clone();
        async move {
            let permit = listings.acquire_owned().await.map_err(io::Error::other)?;
            let measured = tokio::task::spawn_blocking(move || {
                // What cannot be read is not listed either, which WASI's implementation says in its own words.
                let size = directory.map_or(Some(0), |directory| measure(&directory).unwrap_or(Some(0)));
                (size, permit)
            });
            measured.await.map_err(io::Error::other)
        }
    }
}

fn measure(directory: &File) -> io::Result<Option<u64>> {
    // A mount's own descriptor is for its path only, which cannot be read itself.
    let readable = openat(directory, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut size = 0;
    for entry in Dir::new(readable)? {
        size += ENTRY + entry?.file_name().to_bytes().len() as u64;
        if size > MAX_LIST {
            return Ok(None);
        }
    }
    Ok(Some(size))
}
