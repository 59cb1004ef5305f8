//! `tapgate image`: builds, imports, lists, checks and removes base images, each in a folder of its own; and finds them by name
//! for the daemon.

use anyhow::{Context as _, bail};
use serde_json::json;
use std::path::{Path, PathBuf};
use tapgate_vmm::image::{self, Image, Import, Shelved};

/// The image of this name that this very program would build, else the newest whole one.
///
/// # Errors
/// There is none; the message says why the nearest one is unusable.
pub fn find(folder: &Path, name: &str) -> anyhow::Result<Image> {
    match nearest(folder, name) {
        Some(found) => Ok(image::open(&found.dir)?),
        None => bail!(
            "there is no image `{name}` in {}; build debian-12 with `{}`, take another with `{}`",
            folder.display(),
            command("build", folder),
            command("import", folder)
        ),
    }
}

/// Where images are kept unless the operator says otherwise.
pub const FOLDER: &str = "/var/cache/tapgate/images";

/// What to type so that it acts on this folder.
pub fn command(what: &str, folder: &Path) -> String {
    match folder == Path::new(FOLDER) {
        true => format!("tapgate image {what}"),
        false => format!("tapgate image {what} --image-dir {}", folder.display()),
    }
}

fn nearest(folder: &Path, name: &str) -> Option<Shelved> {
    let own = image::recipe_hash();
    let mut found = image::list(folder);
    found.retain(|shelved| shelved.manifest.name == name);
    // Newest first already, and the order of equals stays.
    found.sort_by_key(|shelved| shelved.manifest.recipe != own);
    found.into_iter().next()
}

/// Where images are.
#[derive(clap::Args, Debug)]
pub struct Folder {
    /// Where images are kept
    #[arg(long, env = "TAPGATE_IMAGE_DIR", default_value = FOLDER)]
    image_dir: PathBuf,
}

/// Where images are, and who may need them.
#[derive(clap::Args, Debug)]
pub struct Folders {
    #[command(flatten)]
    images: Folder,
    /// The daemon's data, where VMs note which image they need
    #[arg(long, env = "TAPGATE_DATA_DIR", default_value = "/var/lib/tapgate")]
    data_dir: PathBuf,
}

/// Options of `tapgate image`.
#[derive(clap::Subcommand, Debug)]
pub enum Args {
    /// Build the base image debian-12 unless it is there
    Build {
        /// Where images are kept.
        #[command(flatten)]
        folder: Folder,
    },
    /// Take a stock cloud image (qcow2 or raw) whose guest has cloud-init; use it with the key `image`
    Import {
        /// What it will be called: lower-case letters, digits, `-`, `.` and `_`
        name: String,
        /// The disk's file
        disk: PathBuf,
        /// Kernel to boot with, instead of the newest in the disk's /boot
        #[arg(long, requires = "initrd")]
        kernel: Option<PathBuf>,
        /// Initramfs to boot with
        #[arg(long, requires = "kernel")]
        initrd: Option<PathBuf>,
        /// Kernel command line [default: root=UUID=… ro]
        #[arg(long)]
        cmdline: Option<String>,
        /// Where images are kept.
        #[command(flatten)]
        folder: Folder,
    },
    /// List the images, newest first
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Where images are, and who may need them.
        #[command(flatten)]
        folders: Folders,
    },
    /// Check every file of an image, or of all, against its hash
    Verify {
        /// The image's name
        name: Option<String>,
        /// Where images are kept.
        #[command(flatten)]
        folder: Folder,
    },
    /// Remove an image that no VM needs
    Remove {
        /// Its name, or its folder's
        name: String,
        /// Where images are, and who may need them.
        #[command(flatten)]
        folders: Folders,
    },
    /// Remove every image that no VM needs and of which there is a newer one
    Prune {
        /// Where images are, and who may need them.
        #[command(flatten)]
        folders: Folders,
    },
}

/// Runs `tapgate image`.
///
/// # Errors
/// What was asked for cannot be done; the message says why.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args {
        Args::Build { folder } => {
            let folder = made(&folder.image_dir)?;
            println!("{}", image::build_debian12(folder)?.dir().display());
        }
        Args::Import { name, disk, kernel, initrd, cmdline, folder } => {
            let folder = made(&folder.image_dir)?;
            let kernel = kernel.as_deref().zip(initrd.as_deref());
            let import = Import { name: &name, disk: &disk, kernel, cmdline: cmdline.as_deref() };
            let image = image::import(folder, &import)?;
            println!("{}", image.dir().display());
            eprintln!("kernel {}, `{}`", image.manifest().kernel_version, image.manifest().cmdline);
        }
        Args::List { json, folders } => list(&folders, json)?,
        Args::Verify { name, folder } => verify(&folder.image_dir, name.as_deref())?,
        Args::Remove { name, folders } => {
            let removed = image::remove(&folders.images.image_dir, &name, &folders.data_dir)?;
            println!("removed {}", removed.display());
        }
        Args::Prune { folders } => {
            let folder = &folders.images.image_dir;
            let keep: Vec<PathBuf> = image::list(folder)
                .iter()
                .filter_map(|shelved| Some(nearest(folder, &shelved.manifest.name)?.dir))
                .collect();
            for removed in image::prune(folder, &folders.data_dir, &keep)? {
                println!("removed {}", removed.display());
            }
        }
    }
    Ok(())
}

fn made(folder: &Path) -> anyhow::Result<&Path> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

fn list(folders: &Folders, as_json: bool) -> anyhow::Result<()> {
    let users = image::users(&folders.data_dir)?;
    let images = image::list(&folders.images.image_dir);
    let vms = |shelved: &Shelved| users.get(&shelved.dir).cloned().unwrap_or_default();
    if as_json {
        let rows: Vec<_> = images
            .iter()
            .map(|shelved| {
                let manifest = &shelved.manifest;
                json!({"name": manifest.name, "path": shelved.dir, "kernel": manifest.kernel_version,
                    "disk_bytes": manifest.disk.size, "sha256": manifest.disk.sha256, "vms": vms(shelved)})
            })
            .collect();
        println!("{}", json!({ "images": rows }));
        return Ok(());
    }
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header(["NAME", "FOLDER", "KERNEL", "DISK", "VMS"]);
    for shelved in &images {
        let folder = shelved.dir.file_name().unwrap_or_default().to_string_lossy();
        let disk = format!("{} MiB", shelved.manifest.disk.size >> 20);
        let vms = vms(shelved).len().to_string();
        table.add_row([
            &shelved.manifest.name,
            folder.as_ref(),
            &shelved.manifest.kernel_version,
            &disk,
            &vms,
        ]);
    }
    println!("{table}");
    Ok(())
}

fn verify(folder: &Path, name: Option<&str>) -> anyhow::Result<()> {
    let mut images = image::list(folder);
    images.retain(|shelved| name.is_none_or(|name| shelved.manifest.name == name));
    if images.is_empty() {
        bail!("there is no such image in {}; see `tapgate image list`", folder.display());
    }
    let mut broken = 0;
    for shelved in images {
        match image::verify(&shelved.dir) {
            Ok(_) => println!("ok      {}", shelved.dir.display()),
            Err(error) => {
                broken += 1;
                println!("BROKEN  {error}");
            }
        }
    }
    if broken > 0 { bail!("{broken} images are broken") } else { Ok(()) }
}
