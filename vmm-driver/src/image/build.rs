//! Builds the base image `debian-12` with mmdebstrap and `mkfs.ext4 -d`: no loop device, no mount.
//!
//! Two layers are cached by content: the packages' tarball (slow, changes with the package list) and the finished image
//! (fast, changes with the agent or a file). Half-built things live under temporary names and never under a final one.

use super::manifest::{self, FileSeal, Manifest, hex};
use super::rootfs::{BASHRC, FILES, GENERATORS, LATER, LATER_TEXT, MASKED, PACKAGES, furnish};
use super::{GUEST_AGENT, Image, ImageError, cpio::Archive, modules, open};
use crate::durable;
use sha2::{Digest as _, Sha256};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const NAME: &str = "debian-12";
const SUITE: &str = "bookworm";
/// Raise when what this file does changes.
const VERSION: &str = "1";
/// The root file system's size; a VM's disk is larger and the agent grows it.
const DISK: u64 = 2 << 30;
const CMDLINE: &str = "root=/dev/vda rw net.ifnames=0 8250.nr_uarts=1 apparmor=0 systemd.show_status=false";
/// Held by whoever builds.
const LOCK: &str = ".build.lock";
/// Reference time of every file that the build makes.
const EPOCH: &str = "1700000000";

/// The hash of everything that goes into the image, but for the packages' versions.
pub fn recipe_hash() -> String {
    let mut hasher = Sha256::new();
    let mut add = |part: &[u8]| {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    };
    add(base_hash().as_bytes());
    add(CMDLINE.as_bytes());
    add(&DISK.to_le_bytes());
    for (name, content) in FILES {
        add(name.as_bytes());
        add(content.as_bytes());
    }
    let names = MASKED.iter().chain(GENERATORS).chain(LATER).chain(modules::WANTED);
    names.chain([&LATER_TEXT]).for_each(|name| add(name.as_bytes()));
    add(BASHRC.as_bytes());
    add(GUEST_AGENT);
    hex(&hasher.finalize())
}

fn base_hash() -> String {
    let text = format!("{VERSION} {SUITE} {}", PACKAGES.join(" "));
    hex(&Sha256::digest(text.as_bytes()))
}

/// The image `debian-12`, from the cache or built now. Needs root (owners of files in the image).
pub fn build_debian12(cache: &Path) -> Result<Image, ImageError> {
    let recipe = recipe_hash();
    let dir = cache.join(format!("{NAME}-{}", &recipe[..16]));
    if let Ok(image) = open(&dir) {
        return Ok(image);
    }
    if !nix::unistd::geteuid().is_root() {
        return Err(ImageError::Build("it needs root, for the owners of the files in it".into()));
    }
    private_dir(cache)?;
    // One builds; whoever else wants it waits and finds it built.
    let place = cache.join(LOCK);
    let lock = File::create(&place).map_err(ImageError::io(&place))?;
    lock.lock().map_err(ImageError::io(&place))?;
    match open(&dir) {
        Ok(image) => return Ok(image),
        Err(error) if dir.exists() => {
            tracing::warn!(%error, "the cached image is broken and is built again");
            fs::remove_dir_all(&dir).map_err(ImageError::io(&dir))?;
        }
        Err(_) => {}
    }
    let work = Work::new(cache)?;
    let tarball = packages(cache, &work)?;
    let root = work.path().join("root");
    fs::create_dir(&root).map_err(ImageError::io(&root))?;
    run("tar", Command::new("tar").args(["--numeric-owner", "-xpf"]).arg(&tarball).arg("-C").arg(&root))?;
    let new = work.path().join("image");
    fs::create_dir(&new).map_err(ImageError::io(&new))?;
    let manifest = assemble(&root, &new, recipe)?;
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| ImageError::Build(e.to_string()))?;
    let file = new.join(manifest::FILE);
    fs::write(&file, text).map_err(ImageError::io(&file))?;
    durable::name_folder(&new, &dir).map_err(ImageError::io(&dir))?;
    tracing::info!(image = %dir.display(), "built");
    open(&dir)
}

/// The packages' tarball, cached.
fn packages(cache: &Path, work: &Work) -> Result<PathBuf, ImageError> {
    let tarball = cache.join(format!("{NAME}-packages-{}.tar", &base_hash()[..16]));
    if tarball.exists() {
        return Ok(tarball);
    }
    tracing::info!("fetching and unpacking Debian packages; this takes about a minute");
    let new = work.path().join("packages.tar");
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--variant=minbase", "--quiet"])
        .arg(format!("--include={}", PACKAGES.join(",")))
        .args(["--aptopt=APT::Install-Recommends \"false\"", "--aptopt=Acquire::Languages \"none\""])
        .args(
            ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"]
                .map(|path| format!("--dpkgopt=path-exclude={path}")),
        )
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .arg(SUITE)
        .arg(&new);
    let sources = sources();
    if sources.is_empty() {
        // mmdebstrap knows where Debian is.
        run("mmdebstrap", &mut command)?;
    } else {
        let list = work.path().join("sources.list");
        fs::write(&list, sources).map_err(ImageError::io(&list))?;
        run("mmdebstrap", command.arg(&list))?;
    }
    durable::name(&new, &tarball).map_err(ImageError::io(&tarball))?;
    Ok(tarball)
}

/// The places of the suite that this machine's apt is set up with, as lines of a sources.list; empty if it knows none.
pub fn sources() -> String {
    let output = Command::new("apt-get")
        .args([
            "indextargets",
            "--format",
            "$(SITE) $(CODENAME) $(COMPONENT) $(ORIGIN)",
            "Created-By: Packages",
        ])
        .stderr(Stdio::null())
        .output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let wanted = [SUITE.to_owned(), format!("{SUITE}-updates"), format!("{SUITE}-security")];
    let mut lines: Vec<String> = text
        .lines()
        .filter_map(|line| {
            let [site, suite, component, "Debian"] = line.split(' ').collect::<Vec<_>>()[..] else {
                return None;
            };
            (wanted.iter().any(|w| w == suite) && component == "main")
                .then(|| format!("deb {site} {suite} main\n"))
        })
        .collect();
    lines.sort();
    lines.dedup();
    // Without the suite itself the others are of no use.
    if lines.iter().any(|line| line.ends_with(&format!(" {SUITE} main\n"))) {
        lines.concat()
    } else {
        String::new()
    }
}

/// Makes kernel, initramfs and disk of an unpacked root file system.
fn assemble(root: &Path, image: &Path, recipe: String) -> Result<Manifest, ImageError> {
    let boot = root.join("boot");
    let kernel_version = fs::read_dir(&boot)
        .map_err(ImageError::io(&boot))?
        .flatten()
        .find_map(|entry| entry.file_name().to_str()?.strip_prefix("vmlinuz-").map(str::to_owned))
        .ok_or_else(|| ImageError::Build("the packages brought no kernel".into()))?;
    let vmlinuz = boot.join(format!("vmlinuz-{kernel_version}"));
    fs::copy(&vmlinuz, image.join("kernel")).map_err(ImageError::io(&vmlinuz))?;
    let initrd = image.join("initrd");
    fs::write(&initrd, initramfs(&root.join("usr/lib/modules").join(&kernel_version))?)
        .map_err(ImageError::io(&initrd))?;
    let packages = package_list(root)?;
    furnish(root)?;
    let disk = image.join("disk.raw");
    File::create(&disk).and_then(|file| file.set_len(DISK)).map_err(ImageError::io(&disk))?;
    // The id and the hash seed come from the recipe, not from chance.
    let uuid = uuid(&recipe);
    run(
        "mkfs.ext4",
        Command::new("mkfs.ext4")
            .args(["-q", "-F", "-L", "tapgate-root", "-m", "1", "-U", &uuid])
            .args([
                "-E",
                &format!("hash_seed={uuid},lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0"),
                "-d",
            ])
            .arg(root)
            .arg(&disk)
            .env("SOURCE_DATE_EPOCH", EPOCH)
            .env("E2FSPROGS_FAKE_TIME", EPOCH),
    )?;
    let seal = |file: &str| FileSeal::of(image, file).map_err(ImageError::io(&image.join(file)));
    Ok(Manifest {
        format: manifest::FORMAT,
        name: NAME.into(),
        recipe,
        kernel: seal("kernel")?,
        initrd: seal("initrd")?,
        disk: seal("disk.raw")?,
        kernel_version,
        cmdline: CMDLINE.into(),
        packages,
    })
}

fn initramfs(modules_dir: &Path) -> Result<Vec<u8>, ImageError> {
    let dep = modules_dir.join("modules.dep");
    let order =
        modules::load_order(&fs::read_to_string(&dep).map_err(ImageError::io(&dep))?, modules::WANTED);
    let mut archive = Archive::default();
    for dir in ["dev", "proc", "sys", "run", "sysroot", "modules"] {
        archive.dir(dir);
    }
    archive.file("init", 0o755, GUEST_AGENT);
    let mut names = String::new();
    for relative in &order {
        let path = modules_dir.join(relative);
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        archive.file(&format!("modules/{name}"), 0o644, &fs::read(&path).map_err(ImageError::io(&path))?);
        names.push_str(name);
        names.push('\n');
    }
    archive.file("modules/order", 0o644, names.as_bytes());
    Ok(archive.finish())
}

/// `name version` of each installed package, from dpkg's own record.
fn package_list(root: &Path) -> Result<Vec<String>, ImageError> {
    let path = root.join("var/lib/dpkg/status");
    let text = fs::read_to_string(&path).map_err(ImageError::io(&path))?;
    let field = |stanza: &str, name: &str| {
        stanza.lines().find_map(|line| line.strip_prefix(name).map(|value| value.trim().to_owned()))
    };
    Ok(text
        .split("\n\n")
        .filter_map(|stanza| Some(format!("{} {}", field(stanza, "Package:")?, field(stanza, "Version:")?)))
        .collect())
}

fn uuid(hash: &str) -> String {
    format!("{}-{}-4{}-8{}-{}", &hash[..8], &hash[8..12], &hash[13..16], &hash[17..20], &hash[20..32])
}

pub(super) fn private_dir(dir: &Path) -> Result<(), ImageError> {
    use std::os::unix::fs::DirBuilderExt as _;
    // Others may look at images: VMMs run without privileges.
    fs::DirBuilder::new().recursive(true).mode(0o755).create(dir).map_err(ImageError::io(dir))
}

/// Runs a program to its end; what it complained about is the error.
pub(super) fn run(name: &str, command: &mut Command) -> Result<(), ImageError> {
    let output =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).output().map_err(|e| {
            ImageError::Build(format!(
                "{name} cannot be started ({e}); on Debian: apt-get install mmdebstrap e2fsprogs tar"
            ))
        })?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let last: Vec<&str> = complaint.lines().rev().filter(|line| !line.trim().is_empty()).take(3).collect();
    Err(ImageError::Build(format!(
        "{name} failed: {}",
        last.into_iter().rev().collect::<Vec<_>>().join("; ")
    )))
}

/// The build's own folder; goes with all that is in it.
pub(super) struct Work(PathBuf);

impl Work {
    pub(super) fn new(cache: &Path) -> Result<Self, ImageError> {
        use std::os::unix::fs::DirBuilderExt as _;
        let path = cache.join(format!(".work-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        // 0700: an unpacked root holds set-user-id programs.
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(ImageError::io(&path))?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
