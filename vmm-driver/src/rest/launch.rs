//! A new process: its disk and seed, its view of files, its way to the tap. Must never leave one that is not noted in the VM's folder, nor
//! speak to it.

use super::{ApiDriver, DISK, INITRD, KERNEL, Kind, Live, Plan, SEED, cloud_hypervisor};
use crate::confine::scratch::Scratch;
use crate::confine::tool::Work;
use crate::confine::view::View;
use crate::confine::{self, Confined, Launch, Network, uid_of};
use crate::disk;
use crate::image::{Image, unpacked};
use crate::process::{Process, ProcessRef};
use crate::qemu::{file, remember};
use crate::spec::{Handle, TapFd, VmSpec, VmmError};
use crate::turn::Wanted;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use tapgate_netns::tap;

/// A tap's network namespace, and descriptors with the numbers they get.
type Wiring = (Option<OwnedFd>, Vec<(OwnedFd, i32)>);

/// How a new process comes to its tap.
pub(super) enum Tap {
    /// The gate's descriptor.
    New(TapFd),
    /// It is lent already; here is its network namespace.
    Lent(OwnedFd),
}

impl ApiDriver {
    /// The VM's disk, made if it is not there, and the image that it was made with.
    pub(super) fn provide(spec: &VmSpec, wanted: &Wanted) -> Result<(Image, PathBuf), VmmError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&spec.dir)
            .map_err(VmmError::io(spec.dir.display().to_string()))?;
        let image = spec.image.as_ref().ok_or_else(|| VmmError::Disk("the VM has no image".into()))?;
        let image = disk::origin(&spec.dir, image)?;
        let work = Work { uid: uid_of(spec.net.slot), wanted };
        let disk = disk::prepare_raw(&spec.dir, &image, spec.snapshot.as_deref(), spec.disk_bytes, work)?;
        Ok((image, disk))
    }

    pub(super) fn launch(
        &self,
        spec: &VmSpec,
        tap: Tap,
        wanted: &Wanted,
    ) -> Result<(Handle, Live), VmmError> {
        let missing = |source| VmmError::NoProgram { program: self.program.display().to_string(), source };
        self.program.metadata().map_err(missing)?;
        let (image, disk) = &Self::provide(spec, wanted)?;
        let uid = uid_of(spec.net.slot);
        let seed = spec.dir.join(file::SEED);
        spec.seed.write(&seed)?;
        for file in [disk, &seed] {
            std::os::unix::fs::chown(file, Some(uid), Some(uid)).map_err(VmmError::io("a disk's owner"))?;
        }
        let kernel = unpacked(image).map_err(|e| VmmError::Start(e.to_string()))?;
        let scratch = Scratch::create(uid).map_err(VmmError::io("the VMM's scratch space"))?;
        let view = || -> std::io::Result<View> {
            let mut view = View::new(&spec.dir, uid)?;
            view.program(&self.program)?;
            view.read_only(&kernel, KERNEL)?;
            view.read_only(&image.initrd(), INITRD)?;
            view.writable(disk, DISK)?;
            view.read_only(&seed, SEED)?;
            view.scratch(&scratch)?;
            view.device("/dev/kvm", 10, 232)?;
            view.device("/dev/urandom", 1, 9)?;
            view.device("/dev/null", 1, 3)?;
            if self.kind == Kind::Firecracker {
                view.device("/dev/net/tun", 10, 200)?;
            }
            Ok(view)
        };
        let view = view().map_err(VmmError::io("the VMM's own view of files"))?;
        let (network, descriptors) = self.wire(spec, tap, uid)?;
        let duplicate = |fd: &OwnedFd| fd.try_clone().map_err(VmmError::io("the tap's network namespace"));
        let plan = Plan {
            id: &spec.id,
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            net: spec.net,
            cmdline: &image.manifest().cmdline,
        };
        let mut notes = Vec::new();
        let cgroup = confine::enclose(self.cgroups.as_deref(), self.demand, spec, self.io, &mut notes)?;
        let output = |name: &str| scratch.append(name).map_err(VmmError::io("the VMM's scratch space"));
        let stdout = if self.kind == Kind::Firecracker { "console" } else { "log" };
        let inside = match &network {
            Some(fd) => Network::Inside(duplicate(fd)?),
            None => Network::None,
        };
        let pid = Launch {
            program: &self.program,
            args: self.kind.args(&plan),
            stdout: output(stdout)?,
            stderr: output("log")?,
            confined: Some(Confined { uid, view, network: inside }),
            descriptors,
            cgroup,
            data: None,
            ends_with_us: false,
        }
        .spawn()?;
        self.noted(spec, pid, notes, scratch, network).inspect_err(|_| confine::end_child(pid))
    }

    /// The way to the tap, and the descriptors to be inherited.
    fn wire(&self, spec: &VmSpec, tap: Tap, uid: u32) -> Result<Wiring, VmmError> {
        match (self.kind, tap) {
            (Kind::Firecracker, Tap::New(fd)) => {
                let network =
                    tap::lend(fd, uid).map_err(|e| VmmError::Gate(format!("its tap cannot be lent: {e}")))?;
                Ok((Some(network), Vec::new()))
            }
            (Kind::Firecracker, Tap::Lent(network)) => Ok((Some(network), Vec::new())),
            (Kind::CloudHypervisor, Tap::New(fd)) => {
                let api = confine::control_socket(&spec.dir.join(file::CONTROL))?;
                Ok((None, vec![(fd, cloud_hypervisor::fd::TAP), (api, cloud_hypervisor::fd::API)]))
            }
            (Kind::CloudHypervisor, Tap::Lent(_)) => {
                Err(VmmError::Gate("Cloud Hypervisor takes its tap as a descriptor".into()))
            }
        }
    }

    fn noted(
        &self,
        spec: &VmSpec,
        pid: i32,
        notes: Vec<String>,
        scratch: Scratch,
        network: Option<OwnedFd>,
    ) -> Result<(Handle, Live), VmmError> {
        let process = ProcessRef::of(pid).map_err(|e| {
            VmmError::Start(format!("it ended at once ({e}): {}", scratch.tail("log", 500).trim()))
        })?;
        let control = (self.kind == Kind::CloudHypervisor).then(|| spec.dir.join(file::CONTROL));
        let handle = Handle { driver: self.kind.name().into(), process, control, notes };
        remember(&spec.dir, &handle)?;
        let process = Process::open(&handle.process).map_err(VmmError::io("pidfd"))?.ok_or(VmmError::Gone)?;
        Ok((handle, Live { process: Arc::new(process), scratch, network, broken: OnceLock::new() }))
    }
}
