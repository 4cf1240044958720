//! Compiles modules in a child process, which is given no more than the module, some memory and some time.
//!
//! A compiler is the largest thing that reads a stranger's bytes. In a process of its own it can be ended, it cannot use up the
//! agent's memory, and what it leaves behind goes with it. It gets the module on its standard input and gives the code on its
//! standard output; it sees no file, no key, no network and no other process (see `sandbox`). What it cannot be kept from is
//! giving code that does something else than the module: whoever takes over the compiler has, at the next start of that module,
//! what the agent has. The signature of the module is checked before.

use crate::engine::code_config;
use crate::memory::Machine;
use crate::sandbox;
use crate::yield_points;
use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use wasmtime::Engine;

const MIB: u64 = 1024 * 1024;
/// Address space of the compiler: at most so much, at least so much, and else this share of the machine.
const MAX_MEMORY: u64 = 3 * 1024 * MIB;
const MIN_MEMORY: u64 = 512 * MIB;
const MEMORY_SHARE: u64 = 2;
/// CPU time for any module, and for each MiB of it.
const CPU: Duration = Duration::from_secs(30);
const CPU_PER_MIB: Duration = Duration::from_secs(4);
/// On a machine with more to do than it has cores the compiler, which gives way to others, takes a multiple of its CPU time.
const WALL: u32 = 10;
/// Code is a few times the size of its module.
const CODE_PER_BYTE: u64 = 24;
const CODE_MIN: u64 = 4 * MIB;
const MAX_MESSAGE: u64 = 8 * 1024;
/// 128 + SIGXCPU and such are the shell's; a process tells the signal itself.
const SIGABRT: i32 = 6;
const SIGKILL: i32 = 9;
const SIGXCPU: i32 = 24;

/// Why there is no code.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// The module's own fault: compiling it again gives the same.
    #[error("{0}")]
    Module(String),
    /// Something else's: compiling it again may work.
    #[error("{0}")]
    Process(String),
}

/// How the compiler is started.
#[derive(Debug, Clone)]
pub struct Compiler {
    /// A program that calls [`main`] when it is started with `arguments` and what follows them.
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
}

/// What one compilation may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limits {
    memory: u64,
    cpu: Duration,
}

impl Limits {
    fn of(module: usize) -> Self {
        let mebibytes = u32::try_from(module as u64 / MIB).unwrap_or(u32::MAX);
        let share = Machine::this().total().unwrap_or(MAX_MEMORY) / MEMORY_SHARE;
        Self { memory: share.clamp(MIN_MEMORY, MAX_MEMORY), cpu: CPU + CPU_PER_MIB.saturating_mul(mebibytes) }
    }
}

impl Compiler {
    /// Compiles a module, be it a component or a core module. Dropping the future ends the compiler.
    pub async fn compile(&self, wasm: &[u8], component: bool) -> Result<Vec<u8>, CompileError> {
        self.compile_within(wasm, component, Limits::of(wasm.len())).await
    }

    async fn compile_within(&self, wasm: &[u8], component: bool, limits: Limits) -> Result<Vec<u8>, CompileError> {
        let failed = |what: &str, error: std::io::Error| CompileError::Process(format!("failed to {what}: {error}"));
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .arg(if component { "component" } else { "core" })
            .args([limits.memory.to_string(), limits.cpu.as_secs().max(1).to_string()])
            .env_clear()
            // An arena for each thread would use up the address space without memory being used.
            .envs([("MALLOC_ARENA_MAX", "2"), ("RUST_BACKTRACE", "0")])
            .env("RAYON_NUM_THREADS", std::thread::available_parallelism().map_or(1, usize::from).to_string())
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| failed("start the compiler", error))?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(mut stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
            return Err(CompileError::Process("the compiler has no pipes".into()));
        };
        let feed = async move {
            // A compiler that breaks off says itself why.
            let _ = stdin.write_all(wasm).await;
        };
        let max_code = (wasm.len() as u64).saturating_mul(CODE_PER_BYTE).max(CODE_MIN);
        let work = async {
            let ((), code, message) = tokio::join!(feed, read(stdout, max_code), read(stderr, MAX_MESSAGE));
            let status = child.wait().await.map_err(|error| failed("wait for the compiler", error))?;
            let code = code.map_err(|error| failed("read from the compiler", error))?;
            Ok((status, code, message.unwrap_or_default()))
        };
        let (status, code, message) = match tokio::time::timeout(limits.cpu.saturating_mul(WALL), work).await {
            Ok(done) => done?,
            // The machine may have had other things to do.
            Err(_) => return Err(CompileError::Process("the compiler took too long".into())),
        };
        if !status.success() {
            return Err(failure(status, &String::from_utf8_lossy(&message), limits));
        }
        if code.len() as u64 > max_code {
            return Err(CompileError::Module(format!("it compiles to more than {max_code} bytes of code")));
        }
        Ok(code)
    }
}

/// Reads so many bytes, and one more where there are more.
async fn read(from: impl AsyncRead + Unpin, limit: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(limit + 1).read_to_end(&mut bytes).await?;
    Ok(bytes)
}

fn failure(status: ExitStatus, message: &str, limits: Limits) -> CompileError {
    let message = message.trim();
    let memory = || CompileError::Module(format!("compiling it takes more than {} MiB of memory", limits.memory / MIB));
    match (status.code(), status.signal()) {
        (Some(REFUSED), _) => CompileError::Module(message.to_owned()),
        (_, Some(SIGXCPU)) => {
            CompileError::Module(format!("compiling it takes more than {} s of CPU time", limits.cpu.as_secs()))
        }
        _ if message.contains("memory allocation of") || message.contains("Cannot allocate memory") => memory(),
        (_, Some(SIGKILL)) => {
            CompileError::Process("the compiler was killed; the machine may be short of memory".into())
        }
        (_, Some(SIGABRT)) if message.is_empty() => memory(),
        (Some(code), _) if code != PANICKED => {
            CompileError::Process(format!("the compiler ended with code {code}: {message}"))
        }
        // A panic, or a stack that was too small.
        _ => CompileError::Module(format!("the compiler failed ({status}): {message}")),
    }
}

/// The exit code of a Rust program that panicked.
const PANICKED: i32 = 101;
/// The exit code for what cannot be compiled.
const REFUSED: i32 = 3;

/// The compiler's own process: `component` or `core`, bytes of memory, seconds of CPU time.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::from(REFUSED as u8)
        }
    }
}

fn run(arguments: impl IntoIterator<Item = OsString>) -> anyhow::Result<()> {
    let arguments: Vec<String> = arguments.into_iter().filter_map(|argument| argument.into_string().ok()).collect();
    let [kind, memory, cpu] = arguments.as_slice() else { anyhow::bail!("usage: component|core MEMORY CPU") };
    sandbox::enter(memory.parse()?, cpu.parse()?)?;
    let mut wasm = Vec::new();
    std::io::stdin().lock().read_to_end(&mut wasm)?;
    let wasm = yield_points::add(&wasm)?;
    let engine = Engine::new(&code_config()).map_err(|error| anyhow::anyhow!("{error:#}"))?;
    let code = if kind == "component" { engine.precompile_component(&wasm) } else { engine.precompile_module(&wasm) };
    std::io::stdout().lock().write_all(&code.map_err(|error| anyhow::anyhow!("{error:#}"))?)?;
    Ok(())
}
