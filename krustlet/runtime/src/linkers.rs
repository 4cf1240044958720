//! What modules may import, and from whom they get it.

use crate::guest::{ComponentState, CoreState, Environment};
use crate::limits::change_fields;
use crate::open::{is_ordinary, open_at};
use crate::stack;
use std::any::Any;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use wasmtime::component::{Linker, Resource};
use wasmtime::error::Context as _;
use wasmtime::{AsContextMut as _, Caller, Engine, Extern, StoreContextMut};
use wasmtime_wasi::WasiView as _;
use wasmtime_wasi::filesystem::{Descriptor, WasiFilesystemView as _};
use wasmtime_wasi::p1::WasiP1Ctx;
use wasmtime_wasi::p1::types::{Errno, Lookupflags};
use wasmtime_wasi::p1::wasi_snapshot_preview1 as p1;
use wasmtime_wasi::p2::bindings::filesystem::types::{
    DescriptorFlags, ErrorCode, Host as _, HostDescriptor as _, NewTimestamp, OpenFlags, PathFlags,
};
use wasmtime_wasi::p2::bindings::io::streams::{Host as _, HostOutputStream};
use wasmtime_wasi::p2::bindings::{LinkOptions, cli};
use wasmtime_wasi::p2::{DynOutputStream, ReaddirIterator};
use wasmtime_wasi_http::p2::HeaderError;
use wasmtime_wasi_http::{FieldMap, FieldMapError, WasiHttpView as _};
use wiggle::{GuestMemory, GuestPtr};

/// Of the WASI that wasmtime-wasi offers; guests that were built against an older 0.2 are given this one.
const TYPES: &str = "wasi:filesystem/types@0.2.12";
const HTTP_TYPES: &str = "wasi:http/types@0.2.12";
const STREAMS: &str = "wasi:io/streams@0.2.12";
/// Bytes that a guest may write to a stream at once.
pub const MAX_WRITE: usize = 64 * 1024;
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
    wasmtime_wasi::p1::add_to_linker_async(&mut linker, |state: &mut CoreState| {
        stack::mark();
        &mut state.wasi
    })?;
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

/// Bounds what a component makes the host hold by its files and streams.
fn limit_component(linker: &mut Linker<ComponentState>) -> wasmtime::Result<()> {
    linker.allow_shadowing(true);
    limit_open_files(linker)?;
    limit_times(linker)?;
    limit_lists(linker)?;
    limit_writes(linker)?;
    limit_headers(linker)?;
    linker.allow_shadowing(false);
    Ok(())
}

/// No stream here permits more at once, and not each of them looks at what it is given.
fn limit_writes(linker: &mut Linker<ComponentState>) -> wasmtime::Result<()> {
    type Arguments = (Resource<DynOutputStream>, Vec<u8>);
    linker.instance(STREAMS)?.func_wrap(
        "[method]output-stream.write",
        |mut store: StoreContextMut<'_, ComponentState>, (stream, bytes): Arguments| {
            if bytes.len() > MAX_WRITE {
                wasmtime::bail!("it wrote {} bytes at once to a stream that permits {MAX_WRITE}", bytes.len());
            }
            let table = store.data_mut().ctx().table;
            match HostOutputStream::write(table, stream, bytes) {
                Ok(()) => Ok((Ok(()),)),
                Err(error) => Ok((Err(table.convert_stream_error(error)?),)),
            }
        },
    )
}

/// What a guest removes from a map of headers leaves no room behind that nobody counts.
fn limit_headers(linker: &mut Linker<ComponentState>) -> wasmtime::Result<()> {
    type Set = (Resource<FieldMap>, String, Vec<Vec<u8>>);
    type Delete = (Resource<FieldMap>, String);
    let told = |result: Result<(), FieldMapError>| match result {
        Ok(()) => Ok((Ok(()),)),
        Err(error) => Ok((Err(HeaderError::from(error).downcast()?),)),
    };
    let mut types = linker.instance(HTTP_TYPES)?;
    types.func_wrap(
        "[method]fields.set",
        move |mut store: StoreContextMut<'_, ComponentState>, (fields, name, values): Set| {
            let http = store.data_mut().http();
            told(change_fields(http.table, &fields, |fields| fields.set(http.hooks, name, values))?)
        },
    )?;
    types.func_wrap(
        "[method]fields.delete",
        move |mut store: StoreContextMut<'_, ComponentState>, (fields, name): Delete| {
            let http = store.data_mut().http();
            told(change_fields(http.table, &fields, |fields| fields.remove_all(http.hooks, name).map(drop))?)
        },
    )
}

/// Directories are listed a few at a time, and what a list takes is the container's memory.
fn limit_lists(linker: &mut Linker<ComponentState>) -> wasmtime::Result<()> {
    linker.instance(TYPES)?.func_wrap_async(
        "[method]descriptor.read-directory",
        |mut store: StoreContextMut<'_, ComponentState>, (directory,): (Resource<Descriptor>,)| {
            Box::new(async move {
                let state = store.data_mut();
                let opened = match state.filesystem().table.get(&directory)? {
                    Descriptor::Dir(opened) => vec![opened.dir.clone()],
                    Descriptor::File(_) => Vec::new(),
                };
                let (size, turn) = state.open_files.size_of_lists(opened).await?;
                let Some(size) = size else { return Ok((Err(ErrorCode::InsufficientMemory),)) };
                let memory = state.limiter.reserve(size)?;
                let mut files = state.filesystem();
                let listed = files.read_directory(directory).await;
                drop(turn);
                match listed {
                    Ok(list) => {
                        let mut lists = std::mem::take(&mut state.open_files.lists);
                        let table = state.filesystem().table;
                        let is_there = |number| table.get(&Resource::<ReaddirIterator>::new_borrow(number)).is_ok();
                        // A list that the guest has dropped may have left its number to this one.
                        lists.retain(|(number, _)| *number != list.rep() && is_there(*number));
                        lists.push((list.rep(), memory));
                        state.open_files.lists = lists;
                        Ok((Ok(list),))
                    }
                    Err(error) => Ok((Err(files.convert_error_code(error)?),)),
                }
            })
        },
    )
}

fn limit_open_files(linker: &mut Linker<ComponentState>) -> wasmtime::Result<()> {
    type Arguments = (Resource<Descriptor>, PathFlags, String, OpenFlags, DescriptorFlags);
    linker.instance(TYPES)?.func_wrap_async(
        "[method]descriptor.open-at",
        |mut store: StoreContextMut<'_, ComponentState>,
         (directory, path_flags, path, open_flags, flags): Arguments| {
            Box::new(async move {
                let state = store.data_mut();
                let Some(taken) = state.open_files.take() else {
                    return Ok((Err(ErrorCode::InsufficientMemory),));
                };
                let table = state.filesystem().table;
                let Descriptor::Dir(directory) = table.get(&directory)?.clone() else {
                    return Ok((Err(ErrorCode::NotDirectory),));
                };
                let opened = match open_at(&directory, path_flags, path, open_flags, flags).await {
                    Ok(opened) => opened,
                    Err(error) => return Ok((Err(error),)),
                };
                let file = match &opened {
                    Descriptor::File(file) => Arc::downgrade(&file.file),
                    Descriptor::Dir(directory) => Arc::downgrade(&directory.dir),
                };
                let opened = state.filesystem().table.push(opened)?;
                state.open_files.hold(file, taken);
                Ok((Ok(opened),))
            })
        },
    )
}

/// WASI's implementation opens what the path leads to for this, so that the same is opened here, and given to it.
fn limit_times(linker: &mut Linker<ComponentState>) -> wasmtime::Result<()> {
    type Arguments = (Resource<Descriptor>, PathFlags, String, NewTimestamp, NewTimestamp);
    linker.instance(TYPES)?.func_wrap_async(
        "[method]descriptor.set-times-at",
        |mut store: StoreContextMut<'_, ComponentState>,
         (directory, path_flags, path, accessed, modified): Arguments| {
            Box::new(async move {
                let mut files = store.data_mut().filesystem();
                // A link that is not followed is not opened.
                if !path_flags.contains(PathFlags::SYMLINK_FOLLOW) {
                    return Ok((match files.set_times_at(directory, path_flags, path, accessed, modified).await {
                        Ok(()) => Ok(()),
                        Err(error) => Err(files.convert_error_code(error)?),
                    },));
                }
                let Descriptor::Dir(directory) = files.table.get(&directory)?.clone() else {
                    return Ok((Err(ErrorCode::NotDirectory),));
                };
                let mut opened = Err(ErrorCode::Access);
                for flags in [DescriptorFlags::READ, DescriptorFlags::WRITE] {
                    if matches!(opened, Err(ErrorCode::Access)) {
                        opened = open_at(&directory, path_flags, path.clone(), OpenFlags::empty(), flags).await;
                    }
                }
                let opened = match opened {
                    Ok(opened) => files.table.push(opened)?,
                    Err(error) => return Ok((Err(error),)),
                };
                let borrowed = Resource::new_borrow(opened.rep());
                let result = files.set_times(borrowed, accessed, modified).await;
                files.table.delete(opened)?;
                match result {
                    Ok(()) => Ok((Ok(()),)),
                    Err(error) => Ok((Err(files.convert_error_code(error)?),)),
                }
            })
        },
    )
}

/// The same for a core module.
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
                if !leads_to_ordinary(wasi, &mut memory, fd, lookup, path, length).await {
                    return Ok(Errno::Perm as i32);
                }
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
    type Times = (i32, i32, i32, i32, i64, i64, i32);
    linker.func_wrap_async(
        PREVIEW_1,
        "path_filestat_set_times",
        |mut caller: Caller<'_, CoreState>, (fd, lookup, path, length, accessed, modified, flags): Times| {
            Box::new(async move {
                let (mut memory, state) = memory(&mut caller)?;
                let wasi = &mut state.wasi;
                if !leads_to_ordinary(wasi, &mut memory, fd, lookup, path, length).await {
                    return Ok(Errno::Perm as i32);
                }
                p1::path_filestat_set_times(wasi, &mut memory, fd, lookup, path, length, accessed, modified, flags)
                    .await
            })
        },
    )?;
    type Read = (i32, i32, i32, i64, i32);
    linker.func_wrap_async(
        PREVIEW_1,
        "fd_readdir",
        |mut caller: Caller<'_, CoreState>, (fd, buffer, length, cookie, used): Read| {
            Box::new(async move {
                let (mut memory, state) = memory(&mut caller)?;
                let directories = directories(state, &mut memory, fd).await;
                let (size, _turn) = state.open_files.size_of_lists(directories).await?;
                let Some(size) = size else { return Ok(Errno::Nomem as i32) };
                // It is made twice, and is gone with the call.
                let _memory = state.limiter.reserve(2 * size)?;
                p1::fd_readdir(&mut state.wasi, &mut memory, fd, buffer, length, cookie, used).await
            })
        },
    )?;
    linker.allow_shadowing(false);
    Ok(())
}

/// Whether a core module may open what its path leads to. Its descriptors are known to WASI's implementation only, which
/// opens it by the path again: what is put there in between is not seen, and holds one thread for each such module.
async fn leads_to_ordinary(
    wasi: &mut WasiP1Ctx,
    memory: &mut GuestMemory<'_>,
    fd: i32,
    lookup: i32,
    path: i32,
    length: i32,
) -> bool {
    use p1::WasiSnapshotPreview1 as _;
    let Ok(lookup) = Lookupflags::try_from(lookup.cast_unsigned()) else { return true };
    let path = GuestPtr::new((path.cast_unsigned(), length.cast_unsigned()));
    // What is not there is not waited for.
    match wasi.path_filestat_get(memory, fd.cast_unsigned().into(), lookup, path).await {
        Ok(found) => is_ordinary(found.filetype),
        Err(_) => true,
    }
}

/// The directories that a core module's descriptor may be. Its number is known to WASI's implementation only, which tells how
/// many links it has: some of those that are open fit, or all may be meant.
async fn directories(state: &mut CoreState, memory: &mut GuestMemory<'_>, fd: i32) -> Vec<Arc<File>> {
    use p1::WasiSnapshotPreview1 as _;
    let Ok(wanted) = state.wasi.fd_filestat_get(memory, (fd as u32).into()).await else { return Vec::new() };
    let table = &mut state.wasi.ctx().table;
    let directory = |entry: &mut (dyn Any + Send)| match entry.downcast_ref() {
        Some(Descriptor::Dir(directory)) => Some(directory.dir.clone()),
        _ => None,
    };
    let all: Vec<Arc<File>> = table.iter_mut().filter_map(directory).collect();
    let fits = |directory: &&Arc<File>| directory.metadata().is_ok_and(|found| found.nlink() == wanted.nlink);
    let fitting: Vec<_> = all.iter().filter(fits).cloned().collect();
    if fitting.is_empty() { all } else { fitting }
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
