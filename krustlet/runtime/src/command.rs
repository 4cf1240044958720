//! Runs commands to completion: wasi:cli/run components and preview1 core modules with `_start`.

use crate::cpu::Sliced;
use crate::error::StartError;
use crate::executor::Executor;
use crate::guest::{Container, ContainerSpec, Failure, Stats};
use crate::metrics::Metrics;
use crate::module::{Code, Module};
use crate::stack;
use std::fmt;
use std::sync::Arc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// 128 + SIGKILL, as a kernel that kills a container reports it.
const KILLED: i32 = 137;
/// 128 + SIGABRT, what a trap amounts to.
const TRAPPED: i32 = 134;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    /// By itself, with exit code 0.
    Completed,
    /// With another exit code, by a trap, or killed.
    Error,
    /// By asking for more memory than its limit, its pod's or the node's.
    OutOfMemory,
}

/// The end of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    pub code: i32,
    pub reason: ExitReason,
    /// Empty when completed.
    pub message: String,
}

impl Exit {
    fn of(result: wasmtime::Result<Result<(), ()>>) -> Self {
        let error = match result {
            Ok(Ok(())) => return Self::code(0),
            Ok(Err(())) => return Self::code(1),
            Err(error) => error,
        };
        match Failure::of(&error) {
            Failure::Exit(code) => Self::code(code),
            Failure::OutOfMemory(message) | Failure::MemoryTaken(message) => {
                Self { code: KILLED, reason: ExitReason::OutOfMemory, message }
            }
            Failure::Trap(message) => Self { code: TRAPPED, reason: ExitReason::Error, message },
            other => Self { code: KILLED, reason: ExitReason::Error, message: other.to_string() },
        }
    }

    fn code(code: i32) -> Self {
        let reason = if code == 0 { ExitReason::Completed } else { ExitReason::Error };
        Self { code, reason, message: String::new() }
    }

    fn killed() -> Self {
        Self { code: KILLED, reason: ExitReason::Error, message: "killed".into() }
    }
}

/// A running command. Dropping it kills it.
pub struct Execution {
    exit: watch::Receiver<Option<Exit>>,
    kill: CancellationToken,
    container: Arc<Container>,
}

impl Execution {
    pub(crate) fn start(
        executor: &Arc<Executor>,
        metrics: &Metrics,
        module: &Module,
        spec: ContainerSpec,
    ) -> Result<Self, StartError> {
        if let Code::HttpProxy(_) = module.code() {
            return Err(StartError::Create {
                container: spec.name,
                cause: "its module answers HTTP requests and cannot be run to completion".into(),
                permanent: true,
            });
        }
        module.check_memory(&spec, executor)?;
        let container = Arc::new(Container::new(spec, executor, None)?);
        module.charge(&container.spec.name, &container.tenant)?;
        let Some(taken) = container.tenant.instances.take(module.units()) else {
            return Err(StartError::Create {
                container: container.spec.name.clone(),
                cause: "its pod has as many instances as it may have of those that the node can hold".into(),
                permanent: false,
            });
        };
        let kill = CancellationToken::new();
        let (send, exit) = watch::channel(None);
        let guest = run(executor.clone(), metrics.clone(), module.clone(), container.clone());
        let memory = container.memory.clone();
        let guest = Sliced::new(container.cpu.clone(), async move { stack::charged(&memory, guest).await });
        let killed = kill.clone();
        executor.handle().spawn(async move {
            let exit = tokio::select! {
                biased;
                () = killed.cancelled() => Exit::killed(),
                result = guest => Exit::of(result),
            };
            drop(taken);
            // The guest is gone and what it wrote is in the log when its end is told.
            send.send_replace(Some(exit));
        });
        Ok(Self { exit, kill, container })
    }

    /// One that has completed without having run.
    pub(crate) fn completed(executor: &Arc<Executor>, spec: ContainerSpec) -> Result<Self, StartError> {
        let container = Arc::new(Container::new(spec, executor, None)?);
        let (_, exit) = watch::channel(Some(Exit::code(0)));
        Ok(Self { exit, kill: CancellationToken::new(), container })
    }

    /// Waits for the end. May be called again; it gives the same answer.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone().unwrap_or_else(Exit::killed),
            // The executor is shutting down.
            Err(_) => Exit::killed(),
        }
    }

    /// Ends the guest within a slice, endless loop or not; exit code 137.
    pub fn kill(&self) {
        self.kill.cancel();
    }

    pub fn stats(&self) -> Stats {
        Stats {
            requests: 0,
            in_flight: 0,
            memory_bytes: self.container.memory.used(),
            code_bytes: self.container.tenant.code_bytes(),
            cpu_time: self.container.cpu.used(),
        }
    }
}

impl Drop for Execution {
    fn drop(&mut self) {
        self.kill.cancel();
    }
}

impl fmt::Debug for Execution {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Execution({})", self.container.spec.name)
    }
}

async fn run(
    executor: Arc<Executor>,
    metrics: Metrics,
    module: Module,
    container: Arc<Container>,
) -> wasmtime::Result<Result<(), ()>> {
    match module.code() {
        Code::Command(command) => {
            let mut store = container.component_store(&executor.engine, &module, metrics.instance())?;
            let command = command.instantiate_async(&mut store).await?;
            command.wasi_cli_run().call_run(&mut store).await
        }
        Code::CoreModule(code) => {
            let mut store = container.core_store(&executor.engine, &module, metrics.instance())?;
            let instance = code.instantiate_async(&mut store).await?;
            let start = instance.get_typed_func::<(), ()>(&mut store, "_start")?;
            start.call_async(&mut store, ()).await.map(Ok)
        }
        Code::HttpProxy(_) => wasmtime::bail!("a module that answers HTTP requests cannot be run to completion"),
    }
}
