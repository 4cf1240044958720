//! What the compiler's process gives up before it reads a stranger's bytes: memory, time, priority, and every system call that
//! it does not need to compute. Without calls that open, connect, start or trace anything it has its three pipes and no more.

use anyhow::Context as _;
use rustix::process::{Resource, Rlimit, setrlimit};

/// A second after the first warning the kernel ends it.
const CPU_GRACE: u64 = 1;

/// Enters the sandbox for good. To be called before there is a second thread.
pub fn enter(memory: u64, cpu_seconds: u64) -> anyhow::Result<()> {
    let limit = |resource, soft, hard| {
        setrlimit(resource, Rlimit { current: Some(soft), maximum: Some(hard) })
            .with_context(|| format!("failed to limit {resource:?}"))
    };
    limit(Resource::Cpu, cpu_seconds, cpu_seconds.saturating_add(CPU_GRACE))?;
    limit(Resource::Core, 0, 0)?;
    limit(Resource::Fsize, 0, 0)?;
    #[cfg(target_os = "linux")]
    {
        limit(Resource::As, memory, memory)?;
        // Whatever becomes of the agent, nobody waits for the code any more.
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        // Nobody else of this user is to look into it either.
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
        // Where memory runs out, this is the process that the kernel is to take. It may always be made worse.
        let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
        let _ = rustix::process::setpriority_process(None, 5);
        system_calls::restrict()?;
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
    Ok(())
}

#[cfg(target_os = "linux")]
mod system_calls {
    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
        TargetArch,
    };
    use std::collections::BTreeMap;

    /// What computing, allocating, threads and three open pipes need.
    const ALLOWED: &[i64] = &[
        libc::SYS_brk,
        libc::SYS_clock_getres,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_close,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_fcntl,
        libc::SYS_fstat,
        libc::SYS_futex,
        libc::SYS_getpid,
        libc::SYS_getrandom,
        libc::SYS_gettid,
        libc::SYS_gettimeofday,
        libc::SYS_lseek,
        libc::SYS_madvise,
        libc::SYS_mmap,
        libc::SYS_mprotect,
        libc::SYS_mremap,
        libc::SYS_munmap,
        libc::SYS_nanosleep,
        libc::SYS_ppoll,
        libc::SYS_prctl,
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_restart_syscall,
        libc::SYS_rseq,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sched_getaffinity,
        libc::SYS_sched_yield,
        libc::SYS_set_robust_list,
        libc::SYS_set_tid_address,
        libc::SYS_sigaltstack,
        libc::SYS_write,
        libc::SYS_writev,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_arch_prctl,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_poll,
    ];

    fn equal(argument: u8, value: u64, length: SeccompCmpArgLen) -> anyhow::Result<Vec<SeccompRule>> {
        let condition = SeccompCondition::new(argument, length, SeccompCmpOp::Eq, value)?;
        Ok(vec![SeccompRule::new(vec![condition])?])
    }

    fn apply(
        rules: BTreeMap<i64, Vec<SeccompRule>>,
        otherwise: SeccompAction,
        matching: SeccompAction,
        target: TargetArch,
    ) -> anyhow::Result<()> {
        let filter: BpfProgram = SeccompFilter::new(rules, otherwise, matching, target)?.try_into()?;
        Ok(seccompiler::apply_filter(&filter)?)
    }

    pub fn restrict() -> anyhow::Result<()> {
        let Ok(target) = TargetArch::try_from(std::env::consts::ARCH) else { return Ok(()) };
        // The C library then makes threads with the older call, whose flags can be looked at.
        let refused = SeccompAction::Errno(libc::ENOSYS as u32);
        apply(BTreeMap::from([(libc::SYS_clone3, Vec::new())]), SeccompAction::Allow, refused, target)?;
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
        let thread = libc::CLONE_THREAD as u64;
        let makes_a_thread = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(thread), thread)?;
        rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![makes_a_thread])?]);
        rules.insert(libc::SYS_clone3, Vec::new());
        // It may end and measure itself, and nobody else.
        let own = u64::from(std::process::id());
        rules.insert(libc::SYS_tgkill, equal(0, own, SeccompCmpArgLen::Dword)?);
        rules.insert(libc::SYS_prlimit64, equal(0, 0, SeccompCmpArgLen::Dword)?);
        apply(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow, target)
    }
}
