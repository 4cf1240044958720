//! From a module's bytes to something that can be instantiated: compile (once a digest), link, find out what it is.

use crate::artifact::{Digest, MAX_MODULE, cut, shown};
use crate::compile::{CompileError, Compiler};
use crate::engine::{MEMORIES, TABLES};
use crate::error::{LoadError, StartError};
use crate::executor::Executor;
use crate::guest::{ComponentState, ContainerSpec, CoreState};
use crate::imports::{self, HANDLER, RUN, START};
use crate::instance_size;
use crate::limits::{ELEMENT, INSTANCE};
use crate::linkers::Linkers;
use crate::memory::{Reservation, Scope};
use crate::metrics::Metrics;
use crate::precompiled::{Cache, VerifiedCode};
use crate::shares::Taken;
use crate::store::Store;
use crate::tenants::{CODE_UNIT, Tenant};
use crate::trusted;
use futures::future::{BoxFuture, FutureExt as _, WeakShared};
use parking_lot::Mutex;
use std::cmp::min_by_key;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Instant;
use tokio::sync::Semaphore;
use wasmtime::component::{Component, Linker};
use wasmtime::{ResourcesRequired, UnknownImportError};
use wasmtime_wasi::p2::bindings::CommandPre;
use wasmtime_wasi_http::p2::bindings::ProxyPre;

/// Refused modules that are remembered, so that each costs one compilation; beyond that, all are forgotten.
const MAX_REFUSED: usize = 1000;

/// While it is compiled, the agent holds a module and its code.
const COMPILING_PER_BYTE: u64 = 8;
/// https://www.w3.org/TR/wasm-core-2/#memory-instances
const WASM_PAGE: u64 = 64 * 1024;
/// Loaded code is there once as code and once as what memories begin with.
const LOADED_PER_BYTE: u64 = 2;

/// What a module is run as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A component that exports `wasi:http/incoming-handler`: served.
    HttpProxy,
    /// A component that exports `wasi:cli/run`: run to completion.
    Command,
    /// A preview1 core module with `_start`: run to completion.
    CoreModule,
}

/// Compiled code, linked but for its instance. Clones share it; the last one frees it.
#[derive(Clone)]
pub struct Module(Arc<Inner>);

pub(crate) struct Inner {
    digest: Digest,
    pub(crate) code: Code,
    instance_bytes: u64,
    /// The code counts as the node's for as long as it is loaded.
    memory: Reservation,
    /// The same of what the first pod that runs it may have.
    charged: Mutex<Option<Taken>>,
}

pub(crate) enum Code {
    HttpProxy(ProxyPre<ComponentState>),
    Command(CommandPre<ComponentState>),
    CoreModule(wasmtime::InstancePre<CoreState>),
}

impl Module {
    pub fn kind(&self) -> Kind {
        match self.0.code {
            Code::HttpProxy(_) => Kind::HttpProxy,
            Code::Command(_) => Kind::Command,
            Code::CoreModule(_) => Kind::CoreModule,
        }
    }

    /// The module layer's digest.
    pub fn digest(&self) -> &str {
        self.0.digest.as_str()
    }

    pub(crate) fn code(&self) -> &Code {
        &self.0.code
    }

    /// To be called when a container of this pod begins to run it. Those that come later share it.
    pub(crate) fn charge(&self, container: &str, tenant: &Tenant) -> Result<(), StartError> {
        let mut charged = self.0.charged.lock();
        if charged.is_none() {
            let units = usize::try_from(self.0.memory.bytes().div_ceil(CODE_UNIT)).unwrap_or(usize::MAX);
            let taken = tenant.code.take(units).ok_or_else(|| StartError::Create {
                container: container.to_owned(),
                cause: "the code of its pod's modules takes more of the node's memory than a pod may have for it"
                    .into(),
                permanent: false,
            })?;
            *charged = Some(taken);
        }
        Ok(())
    }

    /// What the node holds for one instance beside its memories and tables.
    pub(crate) fn instance_bytes(&self) -> u64 {
        self.0.instance_bytes
    }

    /// Fails where the limits have no room for one instance.
    pub(crate) fn check_memory(&self, spec: &ContainerSpec, executor: &Executor) -> Result<(), StartError> {
        let container = (spec.memory_limit(executor), Scope::Container);
        let (limit, scope) = min_by_key(container, spec.parent_memory(executor).least_limit(), |(limit, _)| *limit);
        let needed = self.initial_bytes();
        if needed <= limit {
            return Ok(());
        }
        Err(StartError::Config {
            container: spec.name.clone(),
            cause: format!(
                "the memory limit of the {scope} is {limit} bytes, and an instance of its module begins with {needed}; \
                 raise resources.limits.memory"
            ),
        })
    }

    /// What an instance begins with. Of several memories or tables only the largest is known.
    fn initial_bytes(&self) -> u64 {
        let largest = self.resources_required().map(|required| {
            let memory = required.max_initial_memory_size.unwrap_or_default().saturating_mul(WASM_PAGE);
            let table = required.max_initial_table_size.unwrap_or_default().saturating_mul(ELEMENT as u64);
            memory.saturating_add(table)
        });
        (INSTANCE + self.instance_bytes()).saturating_add(largest.unwrap_or_default())
    }

    /// None where a component imports a module, which no component here can.
    fn resources_required(&self) -> Option<ResourcesRequired> {
        match self.code() {
            Code::HttpProxy(guest) => guest.instance_pre().component().resources_required(),
            Code::Command(guest) => guest.instance_pre().component().resources_required(),
            Code::CoreModule(guest) => Some(guest.module().resources_required()),
        }
    }

    /// How many of the node's instances one of these counts for.
    pub(crate) fn units(&self) -> usize {
        let required = self.resources_required();
        let (memories, tables) = required.map_or((1, 1), |required| (required.num_memories, required.num_tables));
        (memories + 1).div_ceil(MEMORIES).max(tables.div_ceil(TABLES)).max(1) as usize
    }
}

impl fmt::Debug for Module {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Module({:?}, {})", self.kind(), self.0.digest)
    }
}

/// Loads modules.
pub struct Loader {
    pub executor: Arc<Executor>,
    pub store: Arc<Store>,
    pub cache: Arc<Cache>,
    pub metrics: Metrics,
    linkers: Arc<Linkers>,
    compiler: Compiler,
    permits: Semaphore,
    /// What is being loaded. Whoever asks for the same waits for it too; when nobody waits any more, it is given up, and with
    /// it the compiler's process.
    loading: Mutex<HashMap<Digest, WeakShared<Loading>>>,
    /// What was loaded before: the module while something uses it, or the reason why there is none.
    known: Mutex<HashMap<Digest, Known>>,
}

type Loading = BoxFuture<'static, Result<Module, LoadError>>;

enum Known {
    Loaded(Weak<Inner>),
    Refused(LoadError),
}

impl Loader {
    pub fn new(
        executor: Arc<Executor>,
        store: Arc<Store>,
        cache: Arc<Cache>,
        metrics: Metrics,
        compiler: Compiler,
        max_concurrent_compiles: usize,
    ) -> wasmtime::Result<Self> {
        Ok(Self {
            linkers: Arc::new(Linkers::new(&executor.engine)?),
            executor,
            store,
            cache,
            metrics,
            compiler,
            permits: Semaphore::new(max_concurrent_compiles.max(1)),
            loading: Mutex::default(),
            known: Mutex::default(),
        })
    }

    pub async fn load(self: &Arc<Self>, layer: &str) -> Result<Module, LoadError> {
        let digest = Digest::parse(layer)
            .map_err(|cause| LoadError::Internal { digest: shown(layer), cause: format!("no digest: {cause}") })?;
        if let Some(known) = self.known(&digest) {
            return known;
        }
        let loading = {
            let mut all = self.loading.lock();
            match all.get(&digest).and_then(WeakShared::upgrade) {
                Some(loading) => loading,
                None => {
                    all.retain(|_, loading| loading.upgrade().is_some());
                    let (loader, wanted) = (self.clone(), digest.clone());
                    let loading = async move { loader.load_once(wanted).await }.boxed().shared();
                    all.extend(loading.downgrade().map(|loading| (digest, loading)));
                    loading
                }
            }
        };
        loading.await
    }

    async fn load_once(&self, digest: Digest) -> Result<Module, LoadError> {
        if let Some(known) = self.known(&digest) {
            return known;
        }
        let result = self.load_new(&digest).await;
        let known = match &result {
            Ok(module) => Some(Known::Loaded(Arc::downgrade(&module.0))),
            Err(error) if error.is_permanent() => Some(Known::Refused(error.clone())),
            Err(_) => None,
        };
        if let Some(known) = known {
            let mut all = self.known.lock();
            let refused = all.values().filter(|known| matches!(known, Known::Refused(_))).count();
            all.retain(|_, known| match known {
                Known::Loaded(module) => module.strong_count() > 0,
                Known::Refused(_) => refused < MAX_REFUSED,
            });
            all.insert(digest, known);
        }
        result
    }

    fn known(&self, digest: &Digest) -> Option<Result<Module, LoadError>> {
        let known = self.known.lock();
        match known.get(digest)? {
            Known::Loaded(module) => module.upgrade().map(|module| {
                self.metrics.loaded("memory");
                Ok(Module(module))
            }),
            Known::Refused(error) => Some(Err(error.clone())),
        }
    }

    async fn load_new(&self, digest: &Digest) -> Result<Module, LoadError> {
        let (cache, executor, linkers) = (self.cache.clone(), self.executor.clone(), self.linkers.clone());
        let wanted = digest.clone();
        let cached = blocking(digest, move || {
            let Some(code) = cache.load(&wanted) else { return Ok(None) };
            match trusted_module(&executor, &linkers, &wanted, &code) {
                Ok(module) => Ok(Some(module)),
                Err(error @ LoadError::NoMemory { .. }) => Err(error),
                Err(_) => {
                    // Code that carries our HMAC and yet does not load is compiled again.
                    cache.remove(&wanted);
                    Ok(None)
                }
            }
        });
        if let Some(module) = cached.await? {
            self.metrics.loaded("disk");
            return Ok(module);
        }
        let (store, wanted) = (self.store.clone(), digest.clone());
        let checked = blocking(digest, move || {
            let wasm = store.read(&wanted, MAX_MODULE).ok_or_else(|| {
                internal(&wanted, "it is gone from the image store; it is pulled again at the next start".into())
            })?;
            let component = imports::check(&wanted, &wasm)?;
            let instance_bytes = instance_size::of(&wasm).map_err(|error| invalid(&wanted, error.to_string()))?;
            Ok((wasm, component, instance_bytes))
        });
        // The semaphore is never closed.
        let _permit = self.permits.acquire().await;
        let (wasm, component, instance_bytes) = checked.await?;
        let compiling = self
            .executor
            .memory
            .reserve((wasm.len() as u64).saturating_mul(COMPILING_PER_BYTE))
            .map_err(|exceeded| LoadError::NoMemory { digest: digest.to_string(), cause: exceeded.to_string() })?;
        let started = Instant::now();
        let code = self.compiler.compile(&wasm, component).await.map_err(|error| match error {
            CompileError::Module(cause) => invalid(digest, cause),
            CompileError::Process(cause) => internal(digest, cause),
        })?;
        drop(wasm);
        let code = VerifiedCode::of_compiler(code, instance_bytes);
        self.metrics.compiled(started.elapsed());
        self.metrics.loaded("compiled");
        let (cache, executor, linkers) = (self.cache.clone(), self.executor.clone(), self.linkers.clone());
        let wanted = digest.clone();
        blocking(digest, move || {
            drop(compiling);
            let module = trusted_module(&executor, &linkers, &wanted, &code)?;
            if let Err(error) = cache.store(&wanted, &code) {
                tracing::warn!(digest = %wanted, %error, "failed to store compiled code; it is compiled again after a restart");
            }
            Ok(module)
        })
        .await
    }
}

/// Does what takes a while on a thread that may block.
async fn blocking<T: Send + 'static>(
    digest: &Digest,
    work: impl FnOnce() -> Result<T, LoadError> + Send + 'static,
) -> Result<T, LoadError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(internal(digest, format!("the loader failed: {error}"))))
}

/// All that happens to a module before it can be started, in this process.
#[cfg(any(test, feature = "fuzzing"))]
pub fn compile_and_link(executor: &Executor, linkers: &Linkers, wasm: &[u8]) -> Result<Module, LoadError> {
    let digest = Digest::of(wasm);
    let component = imports::check(&digest, wasm)?;
    let code = VerifiedCode::compile(&executor.engine, wasm, component)
        .map_err(|error| invalid(&digest, format!("{error:#}")))?;
    trusted_module(executor, linkers, &digest, &code)
}

fn trusted_module(
    executor: &Executor,
    linkers: &Linkers,
    digest: &Digest,
    code: &VerifiedCode,
) -> Result<Module, LoadError> {
    let size = (code.bytes().len() as u64).saturating_mul(LOADED_PER_BYTE);
    let memory = executor
        .memory
        .reserve(size)
        .map_err(|exceeded| LoadError::NoMemory { digest: digest.to_string(), cause: exceeded.to_string() })?;
    let instance_bytes = code.instance_bytes();
    let code = match wasmtime::Engine::detect_precompiled(code.bytes()) {
        Some(wasmtime::Precompiled::Component) => {
            let component =
                trusted::component(&executor.engine, code).map_err(|error| internal(digest, format!("{error:#}")))?;
            link_component(&linkers.component, digest, &component)?
        }
        Some(wasmtime::Precompiled::Module) => {
            let module =
                trusted::module(&executor.engine, code).map_err(|error| internal(digest, format!("{error:#}")))?;
            link_core(&linkers.core, digest, &module)?
        }
        None => return Err(internal(digest, "the compiler gave no code".into())),
    };
    Ok(Module(Arc::new(Inner { digest: digest.clone(), code, instance_bytes, memory, charged: Mutex::default() })))
}

fn link_component(linker: &Linker<ComponentState>, digest: &Digest, component: &Component) -> Result<Code, LoadError> {
    let engine = linker.engine();
    let linked =
        linker.instantiate_pre(component).map_err(|error| unsupported_import(digest, component, engine, &error))?;
    let component_type = component.component_type();
    let exports: Vec<String> = component_type.exports(engine).map(|(name, _)| name.to_owned()).collect();
    let exports_one = |prefix: &str| exports.iter().any(|name| name.starts_with(prefix));
    let unusable = |error: wasmtime::Error| invalid(digest, format!("{error:#}"));
    if exports_one(HANDLER) {
        ProxyPre::new(linked).map(Code::HttpProxy).map_err(unusable)
    } else if exports_one(RUN) {
        CommandPre::new(linked).map(Code::Command).map_err(unusable)
    } else {
        Err(invalid(
            digest,
            format!(
                "it exports neither {HANDLER}x nor {RUN}x, so that there is nothing to run; its exports: {exports:?}"
            ),
        ))
    }
}

fn link_core(
    linker: &wasmtime::Linker<CoreState>,
    digest: &Digest,
    module: &wasmtime::Module,
) -> Result<Code, LoadError> {
    let linked = linker.instantiate_pre(module).map_err(|error| match error.downcast_ref::<UnknownImportError>() {
        Some(unknown) => LoadError::UnsupportedImport {
            digest: digest.to_string(),
            import: format!("{}.{}", shown(unknown.module()), shown(unknown.name())),
            hint: "; a core module may import wasi_snapshot_preview1 only".into(),
        },
        None => invalid(digest, format!("{error:#}")),
    })?;
    let start = module.get_export(START);
    if !start.is_some_and(|export| {
        export.func().is_some_and(|function| function.params().len() == 0 && function.results().len() == 0)
    }) {
        return Err(invalid(
            digest,
            format!("it exports no function {START} without parameters, so that there is nothing to run"),
        ));
    }
    Ok(Code::CoreModule(linked))
}

/// The linker names the import that it has no match for in its message; the component's own list makes sure of the name.
fn unsupported_import(
    digest: &Digest,
    component: &Component,
    engine: &wasmtime::Engine,
    error: &wasmtime::Error,
) -> LoadError {
    let message = format!("{error:#}");
    let component_type = component.component_type();
    let named =
        component_type.imports(engine).map(|(name, _)| name).find(|name| message.contains(&format!("`{name}`")));
    let Some(import) = named else { return invalid(digest, message) };
    let hint = format!(" ({})", cut(&message));
    LoadError::UnsupportedImport { digest: digest.to_string(), import: shown(import), hint }
}

fn invalid(digest: &Digest, cause: String) -> LoadError {
    LoadError::InvalidModule { digest: digest.to_string(), cause: cut(&cause) }
}

fn internal(digest: &Digest, cause: String) -> LoadError {
    LoadError::Internal { digest: digest.to_string(), cause: cut(&cause) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn components_of_every_release_of_wasi_0_2_are_linked_and_those_of_its_drafts_refused() {
        let executor = Executor::for_tests().unwrap();
        let linkers = Linkers::new(&executor.engine).unwrap();
        let linked = |version: &str| {
            let guest = include_str!("../tests/guest.wat").replace("@0.2.0", &format!("@{version}"));
            compile_and_link(&executor, &linkers, &wat::parse_str(guest).unwrap())
        };
        for patch in (0..=13).chain([99]) {
            assert_eq!(linked(&format!("0.2.{patch}")).unwrap().kind(), Kind::HttpProxy, "0.2.{patch}");
        }
        for draft in ["0.2.0-rc-2023-12-05", "0.2.0-draft"] {
            let error = linked(draft).unwrap_err().to_string();
            assert!(error.contains(draft), "{error}");
        }
    }

    #[tokio::test]
    async fn a_refused_module_is_looked_at_once_and_only_so_many_are_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let executor = Arc::new(Executor::for_tests().unwrap());
        let store = Arc::new(Store::open(directory.path().join("images")).unwrap());
        let cache = Arc::new(Cache::open(directory.path().join("precompiled"), &executor.engine).unwrap());
        let metrics = Metrics::register(&mut prometheus_client::registry::Registry::default());
        let compiler = Compiler { program: "/does/not/exist".into(), arguments: Vec::new() };
        let loader = Arc::new(Loader::new(executor, store.clone(), cache, metrics, compiler, 2).unwrap());
        for number in 0..=MAX_REFUSED {
            let module = format!("no module {number}");
            let digest = Digest::of(module.as_bytes());
            store.write(module.as_bytes()).unwrap();
            let error = loader.load(digest.as_str()).await.unwrap_err();
            assert_eq!(error.reason(), "InvalidImage");
            assert_eq!(loader.load(digest.as_str()).await.unwrap_err().to_string(), error.to_string());
            assert!(loader.known(&digest).is_some_and(|known| known.is_err()));
        }
        let known = loader.known.lock().len();
        assert!(known <= MAX_REFUSED, "{known}");
        assert!(loader.loading.lock().len() <= 1, "what is loaded is not kept");
    }
}
