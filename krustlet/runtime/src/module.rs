//! From a module's bytes to something that can be instantiated: compile (once a digest), link, find out what it is.

use crate::SharedLocks;
use crate::artifact::{Digest, MAX_MODULE, cut, shown};
use crate::engine::Executor;
use crate::error::LoadError;
use crate::guest::{ComponentState, CoreState};
use crate::metrics::Metrics;
use crate::precompiled::{Cache, VerifiedCode};
use crate::store::Store;
use crate::trusted;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;
use tokio::sync::Semaphore;
use wasmtime::UnknownImportError;
use wasmtime::component::Component;
use wasmtime_wasi::p2::bindings::CommandPre;
use wasmtime_wasi_http::p2::bindings::ProxyPre;

const HANDLER: &str = "wasi:http/incoming-handler@0.2.";
const RUN: &str = "wasi:cli/run@0.2.";
const START: &str = "_start";
/// Refused modules that are remembered, so that each costs one compilation; beyond that, all are forgotten.
const MAX_REFUSED: usize = 1000;

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
    compilers: Arc<rayon::ThreadPool>,
    permits: Semaphore,
    locks: SharedLocks<Digest>,
    /// What was loaded before: the module while something uses it, or the reason why there is none.
    known: Mutex<HashMap<Digest, Known>>,
}

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
        max_concurrent_compiles: usize,
    ) -> anyhow::Result<Self> {
        let compilers = rayon::ThreadPoolBuilder::new()
            .thread_name(|number| format!("compile-{number}"))
            .start_handler(|_| lower_priority())
            // A panic in the compiler costs its module, not the node.
            .panic_handler(|_| tracing::error!("the compiler panicked"))
            .build()?;
        Ok(Self {
            executor,
            store,
            cache,
            metrics,
            compilers: Arc::new(compilers),
            permits: Semaphore::new(max_concurrent_compiles.max(1)),
            locks: SharedLocks::default(),
            known: Mutex::default(),
        })
    }

    pub async fn load(self: &Arc<Self>, layer: &str) -> Result<Module, LoadError> {
        let digest = Digest::parse(layer)
            .map_err(|cause| LoadError::Internal { digest: shown(layer), cause: format!("no digest: {cause}") })?;
        if let Some(known) = self.known(&digest) {
            return known;
        }
        // A compilation cannot be stopped. Were it to lose its lock and its place among the others with the pod that asked
        // for it, pods that come and go would have any number of them under way.
        let (loader, wanted) = (self.clone(), digest.clone());
        match tokio::spawn(async move { loader.load_once(wanted).await }).await {
            Ok(result) => result,
            Err(error) => Err(internal(&digest, format!("the loader failed: {error}"))),
        }
    }

    async fn load_once(&self, digest: Digest) -> Result<Module, LoadError> {
        let _lock = self.locks.lock(&digest).await;
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
            let mut all = self.known.lock().unwrap_or_else(PoisonError::into_inner);
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
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match known.get(digest)? {
            Known::Loaded(module) => module.upgrade().map(|module| {
                self.metrics.loaded("memory");
                Ok(Module(module))
            }),
            Known::Refused(error) => Some(Err(error.clone())),
        }
    }

    async fn load_new(&self, digest: &Digest) -> Result<Module, LoadError> {
        let (cache, executor, wanted) = (self.cache.clone(), self.executor.clone(), digest.clone());
        let cached = tokio::task::spawn_blocking(move || {
            let code = cache.load(&wanted)?;
            // Code that carries our HMAC and yet does not load is compiled again.
            trusted_module(&executor, &wanted, &code).inspect_err(|_| _ = cache.remove(&wanted)).ok()
        });
        if let Ok(Some(module)) = cached.await {
            self.metrics.loaded("disk");
            return Ok(module);
        }
        // The semaphore is never closed.
        let _permit = self.permits.acquire().await;
        let (send, receive) = tokio::sync::oneshot::channel();
        let (store, cache, executor) = (self.store.clone(), self.cache.clone(), self.executor.clone());
        let (metrics, wanted) = (self.metrics.clone(), digest.clone());
        // The pool's threads, this one and those that it shares the functions out to, have a lower priority than serving.
        self.compilers.spawn(move || {
            let _ = send.send(compile(&executor, &store, &cache, &metrics, &wanted));
        });
        receive.await.unwrap_or_else(|_| Err(internal(digest, "the compiler panicked".into())))
    }
}

fn compile(
    executor: &Executor,
    store: &Store,
    cache: &Cache,
    metrics: &Metrics,
    digest: &Digest,
) -> Result<Module, LoadError> {
    let wasm = store.read(digest, MAX_MODULE).ok_or_else(|| {
        internal(digest, "it is gone from the image store; it is pulled again at the next start".into())
    })?;
    let started = Instant::now();
    let code = compile_bytes(executor, digest, &wasm)?;
    metrics.compiled(started.elapsed());
    metrics.loaded("compiled");
    let module = trusted_module(executor, digest, &code)?;
    if let Err(error) = cache.store(digest, &code) {
        tracing::warn!(%digest, %error, "failed to store compiled code; it is compiled again after a restart");
    }
    Ok(module)
}

fn compile_bytes(executor: &Executor, digest: &Digest, wasm: &[u8]) -> Result<VerifiedCode, LoadError> {
    VerifiedCode::compile(&executor.engine, wasm, is_component(wasm))
        .map_err(|error| invalid(digest, format!("{error:#}")))
}

/// All that happens to a module before it can be started.
#[cfg(any(test, feature = "fuzzing"))]
pub fn compile_and_link(executor: &Executor, wasm: &[u8]) -> Result<Module, LoadError> {
    let digest = Digest::of(wasm);
    trusted_module(executor, &digest, &compile_bytes(executor, &digest, wasm)?)
}

/// The layer field of the header: 0 is a core module, 1 a component.
fn is_component(wasm: &[u8]) -> bool {
    wasm.get(6..8) == Some(&[1, 0])
}

fn trusted_module(executor: &Executor, digest: &Digest, code: &VerifiedCode) -> Result<Module, LoadError> {
    let code = match wasmtime::Engine::detect_precompiled(code.bytes()) {
        Some(wasmtime::Precompiled::Component) => {
            let component =
                trusted::component(&executor.engine, code).map_err(|error| internal(digest, format!("{error:#}")))?;
            link_component(executor, digest, &component)?
        }
        Some(wasmtime::Precompiled::Module) => {
            let module =
                trusted::module(&executor.engine, code).map_err(|error| internal(digest, format!("{error:#}")))?;
            link_core(executor, digest, &module)?
        }
        None => return Err(internal(digest, "the compiler gave no code".into())),
    };
    Ok(Module(Arc::new(Inner { digest: digest.clone(), code })))
}

fn link_component(executor: &Executor, digest: &Digest, component: &Component) -> Result<Code, LoadError> {
    let engine = &executor.engine;
    let linked = executor
        .component_linker
        .instantiate_pre(component)
        .map_err(|error| unsupported_import(digest, component, engine, &error))?;
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

fn link_core(executor: &Executor, digest: &Digest, module: &wasmtime::Module) -> Result<Code, LoadError> {
    let linked = executor.core_linker.instantiate_pre(module).map_err(|error| {
        match error.downcast_ref::<UnknownImportError>() {
            Some(unknown) => LoadError::UnsupportedImport {
                digest: digest.to_string(),
                import: format!("{}.{}", shown(unknown.module()), shown(unknown.name())),
                hint: "; a core module may import wasi_snapshot_preview1 only".into(),
            },
            None => invalid(digest, format!("{error:#}")),
        }
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
    let hint = if import.starts_with("wasi:sockets/") {
        "; sockets are closed to guests, outbound HTTP goes through wasi:http/outgoing-handler".to_owned()
    } else {
        format!(" ({})", cut(&message))
    };
    LoadError::UnsupportedImport { digest: digest.to_string(), import: shown(import), hint }
}

fn invalid(digest: &Digest, cause: String) -> LoadError {
    LoadError::InvalidModule { digest: digest.to_string(), cause: cut(&cause) }
}

fn internal(digest: &Digest, cause: String) -> LoadError {
    LoadError::Internal { digest: digest.to_string(), cause: cut(&cause) }
}

/// On Linux a nice value is a thread's own. Elsewhere it is the process's, and must be left alone.
fn lower_priority() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, 10) {
        tracing::debug!(%error, "failed to lower the priority of a compiler thread");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_refused_module_is_compiled_once_and_only_so_many_are_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let executor = Arc::new(Executor::new().unwrap());
        let store = Arc::new(Store::open(directory.path().join("images")).unwrap());
        let cache = Arc::new(Cache::open(directory.path().join("precompiled"), &executor.engine).unwrap());
        let metrics = Metrics::register(&mut prometheus_client::registry::Registry::default());
        let loader = Arc::new(Loader::new(executor, store.clone(), cache, metrics, 2).unwrap());
        for number in 0..=MAX_REFUSED {
            let module = format!("no module {number}");
            let digest = Digest::of(module.as_bytes());
            store.write(module.as_bytes()).unwrap();
            let error = loader.load(digest.as_str()).await.unwrap_err();
            assert_eq!(error.reason(), "InvalidImage");
            assert_eq!(loader.load(digest.as_str()).await.unwrap_err().to_string(), error.to_string());
            assert!(loader.known(&digest).is_some_and(|known| known.is_err()));
        }
        let known = loader.known.lock().unwrap().len();
        assert!(known <= MAX_REFUSED, "{known}");
    }
}
