//! Attaches the programs to a link of the egress namespace, so that they stay when this process goes.
//!
//! From Linux 6.6 by TCX, the attachment pinned; below by a clsact filter of a fixed handle, which stays by itself. Both
//! can be given a newer program in one step, with no moment without any.

use crate::{
    DatapathError, Programs, bpffs,
    objects::{FROM_GUEST, TO_GUEST, program},
};
use aya::{
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact},
    },
    util::KernelVersion,
};
use std::path::{Path, PathBuf};
use tapgate_netns::Netns;

const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// Both programs and where they are attached.
const HOOKS: [(&str, TcAttachType); 2] =
    [(FROM_GUEST, TcAttachType::Ingress), (TO_GUEST, TcAttachType::Egress)];

/// How programs are held on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// By TCX, the attachments pinned: Linux 6.6 and later.
    Tcx,
    /// By filters of a clsact qdisc.
    Clsact,
}

impl Attachment {
    /// The best that this kernel has.
    pub fn best() -> Self {
        best()
    }
}

fn best() -> Attachment {
    let since = KernelVersion::new(6, 6, 0);
    match KernelVersion::current() {
        Ok(version) if version >= since => Attachment::Tcx,
        _ => Attachment::Clsact,
    }
}

/// What the names of spare taps begin with, and those of their pins.
pub(crate) const SPARE: &str = "tgs";

/// `of` is a slot, or the name of a spare tap.
fn pin(pins: &Path, of: &str, name: &str) -> PathBuf {
    bpffs::links(pins).join(format!("{of}-{name}"))
}

/// Attaches both programs to a new link.
pub(crate) fn attach(
    how: Attachment,
    programs: &mut Programs,
    egress: &Netns,
    pins: &Path,
    of: &str,
    link: &str,
) -> Result<(), DatapathError> {
    unpin(pins, of)?;
    for (name, kind) in HOOKS {
        let program = program(&mut programs.0, name)?;
        let path = pin(pins, of, name);
        egress.run(|| attach_one(how, program, link, kind, &path))?.map_err(failed("attach", name, link))?;
    }
    Ok(())
}

/// Gives the attachments of a link, made by an earlier daemon, this daemon's programs.
pub(crate) fn replace(
    how: Attachment,
    programs: &mut Programs,
    egress: &Netns,
    pins: &Path,
    slot: u32,
    link: &str,
) -> Result<(), DatapathError> {
    for (name, kind) in HOOKS {
        let program = program(&mut programs.0, name)?;
        let path = pin(pins, &slot.to_string(), name);
        let there = egress
            .run(|| {
                replace_one(how, program, link, kind, &path)
                    .and_then(|()| is_attached(how, program, link, kind))
            })?
            .map_err(failed("replace", name, link))?;
        if !there {
            let why = format!("the program {name} is no longer on its tap");
            return Err(DatapathError::NotAdoptable { slot, why });
        }
    }
    Ok(())
}

/// Removes the attachments' pins. With the pin the attachment goes; a clsact filter goes with its link.
pub(crate) fn detach(pins: &Path, slot: u32) -> Result<(), DatapathError> {
    unpin(pins, &slot.to_string())
}

/// Removes the pins of a slot or of a spare tap.
pub(crate) fn unpin(pins: &Path, of: &str) -> Result<(), DatapathError> {
    for (name, _) in HOOKS {
        bpffs::unpin(&pin(pins, of, name))?;
    }
    Ok(())
}

/// Gives the pins of one tap another tap's name.
pub(crate) fn rename(pins: &Path, from: &str, to: &str) -> Result<(), DatapathError> {
    for (name, _) in HOOKS {
        bpffs::rename(&pin(pins, from, name), &pin(pins, to, name))?;
    }
    Ok(())
}

/// Whether both programs are on the link.
pub(crate) fn are_attached(
    how: Attachment,
    programs: &mut Programs,
    egress: &Netns,
    link: &str,
) -> Result<bool, DatapathError> {
    for (name, kind) in HOOKS {
        let program = program(&mut programs.0, name)?;
        if !egress.run(|| is_attached(how, program, link, kind))?.map_err(failed("find", name, link))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes the pins of spare taps that are gone with their daemon.
pub(crate) fn forget_spares(pins: &Path) -> Result<(), DatapathError> {
    let Ok(entries) = std::fs::read_dir(bpffs::links(pins)) else { return Ok(()) };
    let spare = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with(SPARE);
    for entry in entries.flatten().filter(|entry| spare(&entry.file_name())) {
        bpffs::unpin(&entry.path())?;
    }
    Ok(())
}

/// The slots that have attachments pinned.
pub(crate) fn pinned(pins: &Path) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir(bpffs::links(pins)) else { return Vec::new() };
    let mut slots: Vec<u32> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.split_once('-')?.0.parse().ok())
        .collect();
    slots.sort_unstable();
    slots.dedup();
    slots
}

fn attach_one(
    how: Attachment,
    program: &mut SchedClassifier,
    link: &str,
    kind: TcAttachType,
    path: &Path,
) -> Result<(), ProgramError> {
    if how == Attachment::Tcx {
        let id = program.attach_with_options(link, kind, TcAttachOptions::TcxOrder(LinkOrder::default()))?;
        let attached: FdLink = program.take_link(id)?.try_into().map_err(|_| ProgramError::NotAttached)?;
        // Dropping this side of the pin closes a descriptor and no more.
        attached.pin(path).map_err(|error| ProgramError::IOError(std::io::Error::other(error)))?;
        return Ok(());
    }
    // It may be there from the other direction.
    let _ = qdisc_add_clsact(link);
    let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
    let id = program.attach_with_options(link, kind, TcAttachOptions::Netlink(options))?;
    // Dropping it would remove the filter.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

fn replace_one(
    how: Attachment,
    program: &mut SchedClassifier,
    link: &str,
    kind: TcAttachType,
    path: &Path,
) -> Result<(), ProgramError> {
    let other = |error| ProgramError::IOError(std::io::Error::other(error));
    if how == Attachment::Tcx {
        let pinned = PinnedLink::from_pin(path).map_err(other)?;
        let attached = SchedClassifierLink::try_from(FdLink::from(pinned)).map_err(other)?;
        let id = program.attach_to_link(attached)?;
        // The pin keeps it; this descriptor is not needed.
        drop(program.take_link(id)?);
        return Ok(());
    }
    let attached = SchedClassifierLink::attached(link, kind, PRIORITY, HANDLE, None)?;
    let id = program.attach_to_link(attached)?;
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Whether the program is on the link. By clsact the kernel answered for it when the filter was replaced.
fn is_attached(
    how: Attachment,
    program: &SchedClassifier,
    link: &str,
    kind: TcAttachType,
) -> Result<bool, ProgramError> {
    if how == Attachment::Clsact {
        return Ok(true);
    }
    let id = program.info()?.id();
    let (_, attached) = SchedClassifier::query_tcx(link, kind)?;
    Ok(attached.iter().any(|info| info.id() == id))
}

fn failed(
    what: &'static str,
    program: &'static str,
    link: &str,
) -> impl FnOnce(ProgramError) -> DatapathError {
    let link = link.to_owned();
    move |source| DatapathError::Program { what, program, link, source: Box::new(source) }
}
