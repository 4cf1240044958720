//! Bounds the files that a guest has open: each is one of the node's file descriptors.
//!
//! Wraps the calls that open one, and leaves all others to wasmtime-wasi.

use crate::guest::{ComponentState, CoreState};
use crate::shares::{Share, Taken};
use std::fs::File;
use std::sync::{Arc, Weak};
use wasmtime::component::{Linker, Resource};
use wasmtime::{AsContextMut as _, Caller, Extern, StoreContextMut};
use wasmtime_wasi::filesystem::{Descriptor, WasiFilesystemView as _};
use wasmtime_wasi::p1::types::Errno;
use wasmtime_wasi::p1::wasi_snapshot_preview1 as p1;
use wasmtime_wasi::p2::bindings::filesystem::types::{
    DescriptorFlags, ErrorCode, Host as _, HostDescriptor as _, OpenFlags, PathFlags,
};
use wiggle::GuestMemory;

/// Of the WASI that wasmtime-wasi offers; guests that were built against an older 0.2 are given this one.
const TYPES: &str = "wasi:filesystem/types@0.2.12";
const PREVIEW_1: &str = "wasi_snapshot_preview1";

/// The files that one instance has open.
pub struct OpenFiles {
    share: Arc<Share>,
    open: Vec<(Weak<File>, Taken)>,
    /// Those of a core module, whose own table nobody else can look into.
    unnamed: Vec<Taken>,
}

impl OpenFiles {
    pub fn new(share: Arc<Share>) -> Self {
        Self { share, open: Vec::new(), unnamed: Vec::new() }
    }

    fn take(&mut self) -> Option<Taken> {
        // A stream may hold a file whose descriptor the guest has dropped.
        self.open.retain(|(file, _)| file.strong_count() > 0);
        self.share.take(1)
    }
}

/// For components.
pub fn limit_component(linker: &mut Linker<ComponentState>) -> wasmtime::Result<()> {
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
                        state.open_files.open.push((file, taken));
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

/// For core modules.
pub fn limit_core(linker: &mut wasmtime::Linker<CoreState>) -> wasmtime::Result<()> {
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
                    state.open_files.unnamed.push(taken);
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
                state.open_files.unnamed.pop();
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
                state.open_files.unnamed.pop();
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
