//! What core modules do with their files, bounded as for components.
//!
//! WASI's implementation of preview 1 knows a guest's descriptors by numbers that it tells nobody, and opens by path what they
//! and a path lead to, waiting for the other end of a FIFO. So it is noted here which number is which entry of the instance's
//! table, and files are opened here ([`open_at`]). To have its number, an open file is exchanged for a stand-in: that is what
//! WASI's implementation opens, in a directory that is no guest's.

use crate::guest::{CoreState, MAX_RESOURCES};
use crate::limits::READ_AHEAD;
use crate::open::{open_at, set_times_at};
use crate::shares::Taken;
use std::collections::HashMap;
use std::fs::File;
use wasmtime::component::Resource;
use wasmtime::error::Context as _;
use wasmtime::{AsContextMut as _, Caller, Extern, Linker};
use wasmtime_wasi::filesystem::{Descriptor, Dir, OpenMode, WasiFilesystemView as _};
use wasmtime_wasi::p1::WasiP1Ctx;
use wasmtime_wasi::p1::types::{self, Errno, Fd, Fdflags, Fstflags, Lookupflags, Oflags, Rights};
use wasmtime_wasi::p1::wasi_snapshot_preview1::{self as p1, WasiSnapshotPreview1 as _};
use wasmtime_wasi::p2::bindings::filesystem::types::{Datetime, DescriptorFlags, NewTimestamp};
use wasmtime_wasi::{FsPerms, WasiView as _};
use wiggle::{GuestMemory, GuestPtr};

const MODULE: &str = "wasi_snapshot_preview1";
/// The first descriptor that is a directory; those before it are the standard streams.
const FIRST_DIRECTORY: u32 = 3;
/// A directory that every machine has, and a plain file in it. Neither is read.
#[cfg(target_os = "linux")]
const STAND_IN: (&str, &str) = ("/proc/self", "stat");
#[cfg(not(target_os = "linux"))]
const STAND_IN: (&str, &str) = ("/etc", "hosts");

/// Longer ones are refused by every system here.
const MAX_PATH: usize = 64 * 1024;

/// Which of the guest's descriptors is which entry of its table.
pub struct Descriptors(HashMap<u32, Known>);

struct Known {
    entry: u32,
    /// Its part of the pod's share; the mounts are the container's.
    _taken: Option<Taken>,
}

impl Descriptors {
    /// Those of a guest that has not begun: its mounts.
    pub fn of(wasi: &mut WasiP1Ctx) -> Self {
        // With the first call, whatever it is, WASI's implementation makes their entries, one after the other.
        let _ = wasi.fd_prestat_get(&mut GuestMemory::Unshared(&mut []), FIRST_DIRECTORY.into());
        let table = wasi.ctx().table;
        let mounts = table.iter_mut().filter(|entry| entry.is::<Descriptor>()).count();
        let entries = (0..).filter(|entry| table.get(&Resource::<Descriptor>::new_borrow(*entry)).is_ok()).take(mounts);
        Self(entries.zip(FIRST_DIRECTORY..).map(|(entry, fd)| (fd, Known { entry, _taken: None })).collect())
    }

    /// The entry of a directory or file.
    fn get(&self, fd: u32) -> Result<Resource<Descriptor>, Errno> {
        self.0.get(&fd).map(|known| Resource::new_borrow(known.entry)).ok_or(Errno::Badf)
    }

    fn close(&mut self, fd: u32) {
        self.0.remove(&fd);
    }

    /// What `to` was is closed.
    fn renumber(&mut self, from: u32, to: u32) {
        if from != to {
            match self.0.remove(&from) {
                Some(moved) => _ = self.0.insert(to, moved),
                None => _ = self.0.remove(&to),
            }
        }
    }
}

pub fn limit(linker: &mut Linker<CoreState>) -> wasmtime::Result<()> {
    let stand_in = File::open(STAND_IN.0).with_context(|| format!("failed to open {}", STAND_IN.0))?;
    let stand_in = Dir::new(stand_in, FsPerms::ReadOnly, OpenMode::READ, false);
    linker.allow_shadowing(true);
    type Open = (i32, i32, i32, i32, i32, i64, i64, i32, i32);
    linker.func_wrap_async(
        MODULE,
        "path_open",
        move |mut caller: Caller<'_, CoreState>,
              (fd, lookup, path, length, how, base, _inheriting, flags, opened): Open| {
            let stand_in = stand_in.clone();
            Box::new(async move {
                let (mut memory, state) = memory(&mut caller)?;
                let result = async {
                    let request = Request {
                        fd: fd.cast_unsigned(),
                        lookup: Lookupflags::try_from(lookup)?,
                        path: string(&memory, path, length)?,
                        how: Oflags::try_from(how)?,
                        rights: Rights::try_from(base)?,
                        flags: Fdflags::try_from(flags)?,
                    };
                    let fd = request.open(state, stand_in).await?;
                    Ok(memory.write(GuestPtr::<Fd>::new(opened.cast_unsigned()), fd)?)
                };
                tell(result.await)
            })
        },
    )?;
    linker.func_wrap_async(MODULE, "fd_close", |mut caller: Caller<'_, CoreState>, (fd,): (i32,)| {
        Box::new(async move {
            let (mut memory, state) = memory(&mut caller)?;
            let result = p1::fd_close(&mut state.wasi, &mut memory, fd).await?;
            if result == 0 {
                state.descriptors.close(fd.cast_unsigned());
            }
            Ok(result)
        })
    })?;
    linker.func_wrap_async(MODULE, "fd_renumber", |mut caller: Caller<'_, CoreState>, (from, to): (i32, i32)| {
        Box::new(async move {
            let (mut memory, state) = memory(&mut caller)?;
            let result = p1::fd_renumber(&mut state.wasi, &mut memory, from, to).await?;
            if result == 0 {
                state.descriptors.renumber(from.cast_unsigned(), to.cast_unsigned());
            }
            Ok(result)
        })
    })?;
    type Times = (i32, i32, i32, i32, i64, i64, i32);
    linker.func_wrap_async(
        MODULE,
        "path_filestat_set_times",
        |mut caller: Caller<'_, CoreState>, (fd, lookup, path, length, accessed, modified, flags): Times| {
            Box::new(async move {
                let (memory, state) = memory(&mut caller)?;
                let result = async {
                    let lookup = Lookupflags::try_from(lookup)?;
                    let flags = Fstflags::try_from(flags)?;
                    let accessed = timestamp(flags, Fstflags::ATIM, Fstflags::ATIM_NOW, accessed.cast_unsigned())?;
                    let modified = timestamp(flags, Fstflags::MTIM, Fstflags::MTIM_NOW, modified.cast_unsigned())?;
                    let directory = state.descriptors.get(fd.cast_unsigned())?;
                    let path = string(&memory, path, length)?;
                    let mut files = state.wasi.filesystem();
                    Ok(set_times_at(&mut files, directory, lookup.into(), path, accessed, modified).await?)
                };
                tell(result.await)
            })
        },
    )?;
    type Read = (i32, i32, i32, i64, i32);
    linker.func_wrap_async(
        MODULE,
        "fd_readdir",
        |mut caller: Caller<'_, CoreState>, (fd, buffer, length, cookie, used): Read| {
            Box::new(async move {
                let (mut memory, state) = memory(&mut caller)?;
                let listed = match state.descriptors.get(fd.cast_unsigned()) {
                    Ok(known) => match state.wasi.ctx().table.get(&known)? {
                        Descriptor::Dir(directory) => Some(directory.dir.clone()),
                        Descriptor::File(_) => None,
                    },
                    Err(_) => None,
                };
                let (size, _turn) = state.open_files.size_of_list(listed).await?;
                let Some(size) = size else { return Ok(Errno::Nomem as i32) };
                // It is made twice, and is gone with the call.
                let _memory = state.limiter.reserve(2 * size)?;
                p1::fd_readdir(&mut state.wasi, &mut memory, fd, buffer, length, cookie, used).await
            })
        },
    )?;
    linker.func_wrap_async(
        MODULE,
        "poll_oneoff",
        |mut caller: Caller<'_, CoreState>, (subscriptions, events, count, happened): (i32, i32, i32, i32)| {
            Box::new(async move {
                let (mut memory, state) = memory(&mut caller)?;
                // Each file that is waited for is read ahead of. What lies outside of the guest's memory is refused below.
                let all = GuestPtr::<types::Subscription>::new(subscriptions.cast_unsigned());
                let all = all.as_array(count.cast_unsigned());
                let known = all.iter().take(MAX_RESOURCES).map_while(|one| memory.read(one.ok()?).ok());
                let files = known.filter(|one| matches!(one.u, types::SubscriptionU::FdRead(_))).count();
                let _memory = state.limiter.reserve(files as u64 * READ_AHEAD)?;
                p1::poll_oneoff(&mut state.wasi, &mut memory, subscriptions, events, count, happened).await
            })
        },
    )?;
    linker.allow_shadowing(false);
    Ok(())
}

/// What a guest wants opened.
struct Request {
    fd: u32,
    lookup: Lookupflags,
    path: String,
    how: Oflags,
    rights: Rights,
    flags: Fdflags,
}

impl Request {
    async fn open(self, state: &mut CoreState, stand_in: Dir) -> Result<Fd, types::Error> {
        let taken = state.open_files.take().ok_or(Errno::Mfile)?;
        let access = self.access();
        let directory = state.descriptors.get(self.fd)?;
        let Descriptor::Dir(opener) = state.wasi.ctx().table.get(&directory)?.clone() else {
            return Err(Errno::Notdir.into());
        };
        let opened = open_at(&opener, self.lookup.into(), self.path, self.how.into(), access).await?;
        // Deleted again, for the next one to have its number.
        let free = state.wasi.ctx().table.push(())?;
        let entry = free.rep();
        state.wasi.ctx().table.delete(free)?;
        let how = if matches!(opened, Descriptor::Dir(_)) { Oflags::DIRECTORY } else { Oflags::empty() };
        let fd = self::stand_in(&mut state.wasi, self.fd, &directory, stand_in, how, self.flags).await?;
        let placed = state.wasi.ctx().table.get_mut(&Resource::<Descriptor>::new_borrow(entry))?;
        *placed = opened;
        state.descriptors.0.insert(fd.into(), Known { entry, _taken: Some(taken) });
        Ok(fd)
    }

    fn access(&self) -> DescriptorFlags {
        let rights = [(Rights::FD_READ, DescriptorFlags::READ), (Rights::FD_WRITE, DescriptorFlags::WRITE)];
        let flags = [
            (Fdflags::SYNC, DescriptorFlags::FILE_INTEGRITY_SYNC),
            (Fdflags::DSYNC, DescriptorFlags::DATA_INTEGRITY_SYNC),
            (Fdflags::RSYNC, DescriptorFlags::REQUESTED_WRITE_SYNC),
        ];
        let by_right = rights.iter().filter(|(right, _)| self.rights.contains(*right)).map(|(_, access)| *access);
        let by_flag = flags.iter().filter(|(flag, _)| self.flags.contains(*flag)).map(|(_, access)| *access);
        by_right.chain(by_flag).fold(DescriptorFlags::empty(), |all, access| all | access)
    }
}

/// Has WASI's implementation open the stand-in, with the guest's directory being that of the stand-in for as long as this takes.
async fn stand_in(
    wasi: &mut WasiP1Ctx,
    fd: u32,
    directory: &Resource<Descriptor>,
    stand_in: Dir,
    how: Oflags,
    flags: Fdflags,
) -> Result<Fd, types::Error> {
    let mut name = if how.contains(Oflags::DIRECTORY) { b".".to_vec() } else { STAND_IN.1.as_bytes().to_vec() };
    let path = GuestPtr::<str>::new((0, name.len() as u32));
    let mut memory = GuestMemory::Unshared(&mut name);
    let place = wasi.ctx().table.get_mut(directory)?;
    let theirs = std::mem::replace(place, Descriptor::Dir(stand_in));
    let (read, none) = (Rights::FD_READ, Rights::empty());
    let opened = wasi.path_open(&mut memory, fd.into(), Lookupflags::empty(), path, how, read, none, flags).await;
    *wasi.ctx().table.get_mut(directory)? = theirs;
    opened
}

fn timestamp(flags: Fstflags, given: Fstflags, now: Fstflags, nanoseconds: u64) -> Result<NewTimestamp, Errno> {
    match (flags.contains(given), flags.contains(now)) {
        (true, true) => Err(Errno::Inval),
        (true, false) => Ok(NewTimestamp::Timestamp(Datetime {
            seconds: nanoseconds / 1_000_000_000,
            nanoseconds: (nanoseconds % 1_000_000_000) as u32,
        })),
        (false, true) => Ok(NewTimestamp::Now),
        (false, false) => Ok(NewTimestamp::NoChange),
    }
}

/// A path of the guest's.
fn string(memory: &GuestMemory<'_>, path: i32, length: i32) -> Result<String, types::Error> {
    if length.cast_unsigned() as usize > MAX_PATH {
        return Err(Errno::Nametoolong.into());
    }
    let path = GuestPtr::<str>::new((path.cast_unsigned(), length.cast_unsigned()));
    Ok(memory.as_cow_str(path)?.into_owned())
}

fn tell(result: Result<(), types::Error>) -> wasmtime::Result<i32> {
    match result {
        Ok(()) => Ok(Errno::Success as i32),
        Err(error) => Ok(error.downcast()? as i32),
    }
}

/// The guest's memory, with its budget for copies, and the host's side of it.
fn memory<'a>(caller: &'a mut Caller<'_, CoreState>) -> wasmtime::Result<(GuestMemory<'a>, &'a mut CoreState)> {
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
