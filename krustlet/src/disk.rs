//! The file system that the data directory is on: how large it is, and what of it is free.
//!
//! A file system of another machine can make whoever asks about it wait for ever, so a thread of its own asks, and only about
//! this one. Everybody else reads what it was told last.

use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::watch;
use tracing::warn;

/// How often it is asked.
const PERIOD: Duration = Duration::from_secs(10);
/// How long the start of the agent waits for the first answer.
const FIRST: Duration = Duration::from_secs(5);

/// What a file system has, in bytes and in files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    pub total: u64,
    /// For users other than root.
    pub available: u64,
    pub inodes: u64,
    pub inodes_free: u64,
}

/// The newest figures; a clone reads the same ones.
#[derive(Debug, Clone)]
pub struct Disk(watch::Receiver<Option<Figures>>);

impl Disk {
    /// Asks from now on, for as long as a clone is held. Waits a little for the first answer, and goes on without it.
    pub async fn watch(data_dir: PathBuf) -> Self {
        let shown = data_dir.display().to_string();
        let mut disk = Self::asking(move || figures(&data_dir), PERIOD);
        if tokio::time::timeout(FIRST, disk.0.wait_for(Option::is_some)).await.is_err() {
            warn!("the file system of {shown} does not answer; the node has no disk until it does");
        }
        disk
    }

    fn asking(ask: impl Fn() -> Option<Figures> + Send + 'static, period: Duration) -> Self {
        let (sender, receiver) = watch::channel(None);
        // No task: nobody waits for a thread when the process ends, and this one may be stuck for good.
        std::thread::spawn(move || {
            while !sender.is_closed() {
                if let Some(figures) = ask() {
                    sender.send_replace(Some(figures));
                }
                std::thread::sleep(period);
            }
        });
        Self(receiver)
    }

    /// What was told last; nothing before there was an answer.
    pub fn last(&self) -> Figures {
        self.0.borrow().unwrap_or_default()
    }

    /// What is told from now on.
    pub async fn next(&mut self) -> Figures {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.last()
    }

    /// A file system with these figures, for tests.
    #[cfg(test)]
    pub fn with(figures: Figures) -> Self {
        Self(watch::channel(Some(figures)).1)
    }
}

fn figures(data_dir: &std::path::Path) -> Option<Figures> {
    let found = rustix::fs::statvfs(data_dir).ok()?;
    Some(Figures {
        total: found.f_blocks.saturating_mul(found.f_frsize),
        available: found.f_bavail.saturating_mul(found.f_frsize),
        inodes: found.f_files,
        inodes_free: found.f_ffree,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[tokio::test]
    async fn a_directory_is_measured_by_the_file_system_that_it_is_on() {
        let directory = tempfile::tempdir().unwrap();
        let disk = Disk::watch(directory.path().to_owned()).await;
        assert!(disk.last().total > 0 && disk.last().available <= disk.last().total);
    }

    #[tokio::test]
    async fn a_file_system_that_hangs_leaves_the_last_figures_and_holds_nobody_up() {
        let (answers, asked) = mpsc::channel::<Figures>();
        let ask = move || asked.recv().ok();
        let mut disk = Disk::asking(ask, Duration::ZERO);
        assert_eq!(disk.last(), Figures::default());
        let first = Figures { total: 100, available: 60, ..Figures::default() };
        answers.send(first).unwrap();
        assert_eq!(disk.next().await, first);
        // From here on it waits for an answer that does not come.
        assert_eq!(disk.last(), first);
        let second = Figures { available: 20, ..first };
        answers.send(second).unwrap();
        assert_eq!(disk.next().await, second);
    }
}
