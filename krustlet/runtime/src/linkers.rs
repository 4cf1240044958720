//! What modules may import, and from whom they get it.

use crate::guest::{ComponentState, CoreState, Environment};
use std::sync::Arc;
use wasmtime::component::{Linker, Resource};
use wasmtime::error::Context as _;
use wasmtime::{AsContextMut as _, Caller, Engine, Extern, StoreContextMut};
use wasmtime_wasi::filesystem::{Descriptor, WasiFilesystemView as _};
use wasmtime_wasi::p1::types::Errno;
use wasmtime_wasi::p1::wasi_snapshot_preview1 as p1;
use wasmtime_wasi::p2::bindings::filesystem::types::{
    DescriptorFlags, ErrorCode, Host as _, HostDescriptor as _, OpenFlags, PathFlags,
};
use wasmtime_wasi::p2::bindings::{LinkOptions, cli};
use wiggle::GuestMemory;

/// Of the WASI that wasmtime-wasi offers; guests that were built against an older 0.2 are given this one.
const TYPES: &str = "wasi:filesystem/types@0.2.12";
const PREVIEW_1: &str = "wasi_snapshot_preview1";

pub struct Linkers {
    pub component: Linker<ComponentState>,
    pub core: wasmtime::Linker<CoreState>,
}

impl Linkers {
    pub fn new(engine: &Engine) -> wasmtime::Result<Self> {
        Ok(Self {
            component: component(engine).context("failed to link the component imports")?,
            core: core(engine).context("failed to link the core module imports")?,
        })
    }
}

/// All of wasi:cli and wasi:http 0.2. Sockets are there too, since many toolchains import them whether they are used or not; a
/// guest that makes one or resolves a name is told that it may not.
fn component(engine: &Engine) -> wasmtime::Result<Linker<ComponentState>> {
    let mut linker = Linker::new(engine);
    let mut options = LinkOptions::default();
    options.network_error_code(true);
    wasmtime_wasi::p2::add_to_linker_with_options_async(&mut linker, &options)?;
    wasmtime_wasi_http::p2::add_only_http_to_linker_async(&mut linker)?;
    linker.allow_shadowing(true);
    cli::environment::add_to_linker::<ComponentState, SharedEnvironment>(&mut linker, |state| &*state.environment)?;
    linker.allow_shadowing(false);
    limit_component(&mut linker)?;
    Ok(linker)
}

/// WASI preview 1, whose socket calls work on no descriptor that a guest here can have.
fn core(engine: &Engine) -> wasmtime::Result<wasmtime::Linker<CoreState>> {
    let mut linker = wasmtime::Linker::new(engine);
    wasmtime_wasi::p1::add_to_linker_async(&mut linker, |state: &mut CoreState| &mut state.wasi)?;
    limit_core(&mut linker)?;
    Ok(linker)
}

/// Gives `wasi:cli/environment` from what the container's instances share.
struct SharedEnvironment;

impl wasmtime::component::HasData for SharedEnvironment {
    type Data<'a> = &'a Environment;
}

impl cli::environment::Host for &Environment {
    fn get_environment(&mut self) -> wasmtime::Result<Vec<(String, String)>> {
        Ok(self.variables.clone())
    }

    fn get_arguments(&mut self) -> wasmtime::Result<Vec<String>> {
        Ok(self.arguments.clone())
    }

    fn initial_cwd(&mut self) -> wasmtime::Result<Option<String>> {
        Ok(self.working_dir.clone())
    }
}

/// Counts the files that a component opens.
fn limit_component(linker: &mut Linker<ComponentState>) -> wasmtime::Result<()> {
    type Arguments = (Resource<Descriptor>, PathFlags, String, OpenFlags, DescriptorFlags);
    linker.allow_shadowing(true);
    linker.instance(TYPES)?.func_wrap_async(
        "[method]descriptor.open-at",
        |mut store: StoreContextMut<'_, ComponentState>,
         (directory, path_flags, path, open_flags, flags): Arguments| {
            Box::new(async move {
                let state = store.data_mut();
                let Some(taken) = state.open_files.take() else {
                    return Ok((Err(ErrorCode::InsufficientMemory),));
                };
                let mut files = state.filesystem();
                match files.open_at(directory, path_flags, path, open_flags, flags).await {
                    Ok(opened) => {
                        let file = match files.table.get(&opened)? {
                            Descriptor::File(file) => Arc::downgrade(&file.file),
                            Descriptor::Dir(directory) => Arc::downgrade(&directory.dir),
                        };
                        state.open_files.hold(file, taken);
                        Ok((Ok(opened),))
                    }
                    Err(error) => Ok((Err(files.convert_error_code(error)?),)),
                }
            })
        },
    )?;
    linker.allow_shadowing(false);
    Ok(())
}

/// Counts those of a core module.
fn limit_core(linker: &mut wasmtime::Linker<CoreState>) -> wasmtime::Result<()> {
    type Open = (i32, i32, i32, i32, i32, i64, i64, i32, i32);
    linker.allow_shadowing(true);
    linker.func_wrap_async(
        PREVIEW_1,
        "path_open",
        |mut caller: Caller<'_, CoreState>, (fd, lookup, path, length, open, base, inheriting, flags, opened): Open| {
            Box::new(async move {
                let Some(taken) = caller.data_mut().open_files.take() else { return Ok(Errno::Mfile as i32) };
                let (mut memory, state) = memory(&mut caller)?;
                let wasi = &mut state.wasi;
                let result =
                    p1::path_open(wasi, &mut memory, fd, lookup, path, length, open, base, inheriting, flags, opened)
                        .await?;
                if result == 0 {
                    state.open_files.hold_unnamed(taken);
                }
                Ok(result)
            })
        },
    )?;
    linker.func_wrap_async(PREVIEW_1, "fd_close", |mut caller: Caller<'_, CoreState>, (fd,): (i32,)| {
        Box::new(async move {
            let (mut memory, state) = memory(&mut caller)?;
            let result = p1::fd_close(&mut state.wasi, &mut memory, fd).await?;
            if result == 0 {
                state.open_files.close_unnamed();
            }
            Ok(result)
        })
    })?;
    linker.func_wrap_async(PREVIEW_1, "fd_renumber", |mut caller: Caller<'_, CoreState>, (from, to): (i32, i32)| {
        Box::new(async move {
            let (mut memory, state) = memory(&mut caller)?;
            let result = p1::fd_renumber(&mut state.wasi, &mut memory, from, to).await?;
            if result == 0 && from != to {
                // What `to` was is closed.
                state.open_files.close_unnamed();
            }
            Ok(result)
        })
    })?;
    linker.allow_shadowing(false);
    Ok(())
}

/// The guest's memory, with its budget for copies, and the host's side of it.
fn memory<'a>(caller: &'a mut Caller<'_, CoreState>) -> wasmtime::Result<(GuestMemory<'a>, &'a mut CoreState)> {
    use p1::WasiSnapshotPreview1 as _;
    let export = caller.get_export("memory");
    let fuel = caller.as_context_mut().hostcall_fuel();
    let (memory, state) = match export {
        Some(Extern::Memory(memory)) => {
            let (memory, state) = memory.data_and_store_mut(caller);
            (GuestMemory::Unshared(memory), state)
        }
        // Shared ones need threads, which no guest here has.
        _ => wasmtime::bail!("missing required memory export"),
    };
    state.wasi.set_hostcall_fuel(fuel);
    Ok((memory, state))
}
