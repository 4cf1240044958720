//! The machine's memory, as far as the agent's control group may use it.

use parking_lot::Mutex;

/// In bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    pub total: u64,
    /// Free, or would be if the kernel wanted it.
    pub available: u64,
}

/// Where it is looked up; zeros where the system does not tell.
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
