//! What modules may import, and from whom they get it.

use crate::guest::{ComponentState, CoreState, Environment};
use crate::limits::{change_fields, size_of_fields};
use crate::open::{open_at, set_times_at};
use crate::{preview_1, stack};
use std::sync::Arc;
use wasmtime::component::{Linker, Resource};
use wasmtime::error::Context as _;
use wasmtime::{Engine, StoreContextMut};
use wasmtime_wasi::WasiView as _;
use wasmtime_wasi::filesystem::{Descriptor, WasiFilesystemView as _};
use wasmtime_wasi::p2::bindings::filesystem::types::{
    DescriptorFlags, ErrorCode, Host as _, HostDescriptor as _, NewTimestamp, OpenFlags, PathFlags,
};
use wasmtime_wasi::p2::bindings::io::streams::{Host as _, HostOutputStream};
use wasmtime_wasi::p2::bindings::{LinkOptions, cli};
use wasmtime_wasi::p2::{DynInputStream, DynOutputStream, FsResult, ReaddirIterator};
use wasmtime_wasi_http::p2::HeaderError;
use wasmtime_wasi_http::p2::bindings::http::types as http_types;
use wasmtime_wasi_http::p2::body::HostOutgoingBody;
use wasmtime_wasi_http::{FieldMap, FieldMapError, WasiHttpView as _};

/// Of the WASI that wasmtime-wasi offers; guests that were built against an older 0.2 are given this one.
const TYPES: &str = "wasi:filesystem/types@0.2.12";
const HTTP_TYPES: &str = "wasi:http/types@0.2.12";
const STREAMS: &str = "wasi:io/streams@0.2.12";
/// Bytes that a guest may write to a stream at once.
pub const MAX_WRITE: usize = 64 * 1024;
/// What trailers may take: once the guest has given them away, nothing counts them.
const MAX_TRAILERS: u64 = 16 * 1024;

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
    preview_1::limit(&mut linker)?;
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
    limit_streams(linker)?;
    limit_writes(linker)?;
    limit_headers(linker)?;
    limit_trailers(linker)?;
    linker.allow_shadowing(false);
    Ok(())
}

/// A file is one descriptor, and may have thousands of streams, each of which keeps what was read ahead or is being written. They
/// count from the moment that they are there: a guest that waits for them is asked no more.
fn limit_streams(linker: &mut Linker<ComponentState>) -> wasmtime::Result<()> {
    fn counted<T: 'static>(
        state: &mut ComponentState,
        open: impl FnOnce(&mut wasmtime_wasi::filesystem::WasiFilesystemCtxView<'_>) -> FsResult<Resource<T>>,
    ) -> wasmtime::Result<(Result<Resource<T>, ErrorCode>,)> {
        let mut files = state.filesystem();
        let opened = match open(&mut files) {
            Ok(opened) => Ok(opened),
            Err(error) => Err(files.convert_error_code(error)?),
        };
        state.count_handles()?;
        Ok((opened,))
    }
    type At = (Resource<Descriptor>, u64);
    let mut types = linker.instance(TYPES)?;
    types.func_wrap(
        "[method]descriptor.read-via-stream",
        |mut store: StoreContextMut<'_, ComponentState>, (file, offset): At| {
            counted::<DynInputStream>(store.data_mut(), |files| files.read_via_stream(file, offset))
        },
    )?;
    types.func_wrap(
        "[method]descriptor.write-via-stream",
        |mut store: StoreContextMut<'_, ComponentState>, (file, offset): At| {
            counted::<DynOutputStream>(store.data_mut(), |files| files.write_via_stream(file, offset))
        },
    )?;
    types.func_wrap(
        "[method]descriptor.append-via-stream",
        |mut store: StoreContextMut<'_, ComponentState>, (file,): (Resource<Descriptor>,)| {
            counted::<DynOutputStream>(store.data_mut(), |files| files.append_via_stream(file))
        },
    )
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

fn limit_trailers(linker: &mut Linker<ComponentState>) -> wasmtime::Result<()> {
    type Finish = (Resource<HostOutgoingBody>, Option<Resource<FieldMap>>);
    linker.instance(HTTP_TYPES)?.func_wrap(
        "[static]outgoing-body.finish",
        |mut store: StoreContextMut<'_, ComponentState>, (body, trailers): Finish| {
            let mut view = store.data_mut().http();
            if let Some(trailers) = &trailers
                && size_of_fields(view.table.get(trailers)?) > MAX_TRAILERS
            {
                view.table.delete(Resource::<FieldMap>::new_own(trailers.rep()))?;
                http_types::HostOutgoingBody::drop(&mut view, body)?;
                let cause = format!("trailers take at most {MAX_TRAILERS} bytes");
                return Ok((Err(http_types::ErrorCode::InternalError(Some(cause))),));
            }
            match http_types::HostOutgoingBody::finish(&mut view, body, trailers) {
                Ok(()) => Ok((Ok(()),)),
                Err(error) => Ok((Err(http_types::Host::convert_error_code(&mut view, error)?),)),
            }
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
                    Descriptor::Dir(opened) => Some(opened.dir.clone()),
                    Descriptor::File(_) => None,
                };
                let (size, permit) = state.open_files.size_of_list(opened).await?;
                let Some(size) = size else { return Ok((Err(ErrorCode::InsufficientMemory),)) };
                let memory = state.limiter.reserve(size)?;
                let mut files = state.filesystem();
                let listed = files.read_directory(directory).await;
                drop(permit);
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

fn limit_times(linker: &mut Linker<ComponentState>) -> wasmtime::Result<()> {
    type Arguments = (Resource<Descriptor>, PathFlags, String, NewTimestamp, NewTimestamp);
    linker.instance(TYPES)?.func_wrap_async(
        "[method]descriptor.set-times-at",
        |mut store: StoreContextMut<'_, ComponentState>,
         (directory, path_flags, path, accessed, modified): Arguments| {
            Box::new(async move {
                let mut files = store.data_mut().filesystem();
                match set_times_at(&mut files, directory, path_flags, path, accessed, modified).await {
                    Ok(()) => Ok((Ok(()),)),
                    Err(error) => Ok((Err(files.convert_error_code(error)?),)),
                }
            })
        },
    )
}
