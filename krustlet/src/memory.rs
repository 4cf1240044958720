//! The machine's memory, as far as the agent's control group may use it, and the part of it that pods have together.

use krustlet_runtime::Runtime;
use parking_lot::Mutex;

/// In bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    pub total: u64,
    /// Free, or would be if the kernel wanted it.
    pub available: u64,
}

/// What all pods may take together, and what of it is left: what a kubelet reads from the control group of its pods. Those of
/// this node run in the agent, whose accounts tell.
#[derive(Debug)]
pub enum PodsMemory {
    Of(Runtime),
    #[cfg(test)]
    With(Figures),
}

impl PodsMemory {
    pub fn figures(&self) -> Figures {
        match self {
            Self::Of(runtime) => {
                let (total, used) = runtime.guest_memory();
                Figures { total, available: total.saturating_sub(used) }
            }
            #[cfg(test)]
            Self::With(figures) => *figures,
        }
    }
}

/// Where the machine's is looked up; zeros where the system does not tell.
#[derive(Debug)]
pub struct Memory(Mutex<(Option<sysinfo::System>, Figures)>);

impl Memory {
    pub fn this() -> Self {
        Self(Mutex::new((sysinfo::System::new().ok(), Figures::default())))
    }

    /// A machine with these figures, for tests.
    #[cfg(test)]
    pub fn with(figures: Figures) -> Self {
        Self(Mutex::new((None, figures)))
    }

    pub fn figures(&self) -> Figures {
        let (system, figures) = &mut *self.0.lock();
        if let Some(system) = system {
            system.refresh_memory();
            *figures = Figures { total: system.total_memory(), available: system.available_memory() };
            // What counts is what the agent's own control group may use.
            if let Some(limits) = system.cgroup_limits()
                && limits.total_memory > 0
                && limits.total_memory < figures.total
            {
                figures.total = limits.total_memory;
                figures.available = figures.available.min(limits.free_memory);
            }
        }
        *figures
    }
}
