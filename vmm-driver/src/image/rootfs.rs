//! What the base image's root file system is made of beyond its packages: the agent, its unit, and what systemd leaves
//! out. Everything here is part of the recipe's hash.

use super::{GUEST_AGENT, ImageError};
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

/// Packages beyond Debian's minimal base.
pub const PACKAGES: &[&str] = &[
    "bind9-dnsutils",
    "ca-certificates",
    "curl",
    "git",
    "iproute2",
    "iputils-ping",
    "linux-image-cloud-amd64",
    "netcat-openbsd",
    "openssh-client",
    "openssh-server",
    "openssl",
    "procps",
    "python3",
    "systemd-sysv",
    "tmux",
];

/// Files of the root file system. The agent itself is not listed: it is binary.
pub const FILES: &[(&str, &str)] = &[
    (
        "etc/systemd/system/tapgate-guest-agent.service",
        "[Unit]\n\
         Description=tapgate guest agent\n\
         DefaultDependencies=no\n\
         Before=ssh.service network.target shutdown.target\n\
         Conflicts=shutdown.target\n\
         \n\
         [Service]\n\
         ExecStart=/usr/lib/tapgate/guest-agent serve\n\
         KillMode=process\n\
         Restart=always\n\
         RestartSec=1\n\
         OOMScoreAdjust=-900\n\
         \n\
         [Install]\n\
         WantedBy=sysinit.target\n",
    ),
    // SSH is how a guest becomes ready: it waits for nothing but what it needs.
    (
        "etc/systemd/system/ssh.service",
        "[Unit]\n\
         Description=OpenBSD Secure Shell server\n\
         DefaultDependencies=no\n\
         After=tapgate-guest-agent.service\n\
         Before=shutdown.target\n\
         Conflicts=shutdown.target\n\
         \n\
         [Service]\n\
         EnvironmentFile=-/etc/default/ssh\n\
         ExecStart=/usr/sbin/sshd -D $SSHD_OPTS\n\
         ExecReload=/bin/kill -HUP $MAINPID\n\
         KillMode=process\n\
         Restart=always\n\
         RestartSec=1\n\
         Type=notify\n\
         RuntimeDirectory=sshd\n\
         RuntimeDirectoryMode=0755\n\
         RuntimeDirectoryPreserve=yes\n\
         OOMScoreAdjust=-900\n\
         \n\
         [Install]\n\
         WantedBy=sysinit.target\n\
         Alias=sshd.service\n",
    ),
    (
        "etc/ssh/sshd_config.d/10-tapgate-image.conf",
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUseDNS no\n",
    ),
    ("etc/systemd/journald.conf.d/10-tapgate.conf", "[Journal]\nStorage=volatile\nRuntimeMaxUse=16M\n"),
    ("etc/default/locale", "LANG=C.UTF-8\n"),
    ("etc/fstab", ""),
    ("etc/hostname", "tapgate\n"),
    // Empty: the agent gives every instance its own.
    ("etc/machine-id", ""),
    ("etc/resolv.conf", ""),
];

/// Units that cost time at every boot and do nothing for a guest of this kind.
pub const MASKED: &[&str] = &[
    "kmod-static-nodes.service",
    "modprobe@configfs.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
    "systemd-boot-system-token.service",
    "systemd-remount-fs.service",
    "systemd-sysusers.service",
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty-static.service",
    "getty@tty1.service",
    "ldconfig.service",
    "serial-getty@ttyS0.service",
    "systemd-binfmt.service",
    "systemd-firstboot.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-journal-flush.service",
    "systemd-machine-id-commit.service",
    "systemd-networkd-wait-online.service",
    "systemd-networkd.service",
    "systemd-pcrphase-initrd.service",
    "systemd-pcrphase-sysinit.service",
    "systemd-pcrphase.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-repart.service",
    "systemd-sysext.service",
    "systemd-update-done.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-update-utmp.service",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
];

/// Goes before all else in bash's start file for SSH commands, which ends early for what is not interactive.
pub const BASHRC: &str = "[ ! -r /etc/tapgate/session.sh ] || . /etc/tapgate/session.sh\n";

/// Programs that make units at boot, of kinds that a guest has none of: each is a process that the boot waits for.
pub const GENERATORS: &[&str] = &[
    "systemd-bless-boot-generator",
    "systemd-cryptsetup-generator",
    "systemd-getty-generator",
    "systemd-gpt-auto-generator",
    "systemd-hibernate-resume-generator",
    "systemd-integritysetup-generator",
    "systemd-run-generator",
    "systemd-system-update-generator",
    "systemd-veritysetup-generator",
];

/// Units that wait until SSH answers: they are needed, but not for that.
pub const LATER: &[&str] = &[
    "systemd-modules-load.service",
    "systemd-sysctl.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-tmpfiles-setup.service",
    "systemd-udev-trigger.service",
    "systemd-udevd.service",
];
/// The drop-in that makes them wait.
pub const LATER_TEXT: &str = "[Unit]\nAfter=ssh.service\n";

const ENABLED: &[&str] = &["ssh.service", "tapgate-guest-agent.service"];

/// Puts all of it into an unpacked root file system, and takes out what must not be the same in two machines.
pub fn furnish(root: &Path) -> Result<(), ImageError> {
    let units = root.join("etc/systemd/system");
    for (name, content) in FILES {
        write(&root.join(name), content.as_bytes(), 0o644)?;
    }
    write(&root.join("usr/lib/tapgate/guest-agent"), GUEST_AGENT, 0o755)?;
    let bashrc = root.join("etc/bash.bashrc");
    let debian = fs::read_to_string(&bashrc).map_err(ImageError::io(&bashrc))?;
    write(&bashrc, format!("{BASHRC}{debian}").as_bytes(), 0o644)?;
    for unit in MASKED {
        link("/dev/null", &units.join(unit))?;
    }
    for generator in GENERATORS {
        link("/dev/null", &root.join("etc/systemd/system-generators").join(generator))?;
    }
    for unit in LATER {
        write(&units.join(format!("{unit}.d/10-after-ssh.conf")), LATER_TEXT.as_bytes(), 0o644)?;
    }
    for unit in ENABLED {
        // Where Debian's own unit was enabled it waits for all of multi-user.target.
        remove(&units.join("multi-user.target.wants").join(unit))?;
        link(&format!("/etc/systemd/system/{unit}"), &units.join("sysinit.target.wants").join(unit))?;
    }
    for folder in ["etc/ssh", "boot", "var/lib/apt/lists", "var/cache/apt", "var/cache/debconf", "var/log"] {
        let dir = root.join(folder);
        for entry in fs::read_dir(&dir).map_err(ImageError::io(&dir))?.flatten() {
            let host_key = entry.file_name().to_string_lossy().starts_with("ssh_host_");
            if folder != "etc/ssh" || host_key {
                remove(&entry.path())?;
            }
        }
    }
    for name in ["vmlinuz", "vmlinuz.old", "initrd.img", "initrd.img.old", "var/lib/dbus/machine-id"] {
        remove(&root.join(name))?;
    }
    Ok(())
}

fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), ImageError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(ImageError::io(parent))?;
    }
    // Never through a symlink: in an unpacked root it may lead to the host's own file.
    remove(path)?;
    fs::write(path, content).map_err(ImageError::io(path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(ImageError::io(path))
}

fn link(target: &str, path: &Path) -> Result<(), ImageError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(ImageError::io(parent))?;
    }
    remove(path)?;
    symlink(target, path).map_err(ImageError::io(path))
}

fn remove(path: &Path) -> Result<(), ImageError> {
    let result = match path.symlink_metadata() {
        Ok(data) if data.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    };
    result.map_err(ImageError::io(path))
}
