//! Finds base images by name in the image folder, where each build has a folder of its own, and builds them.

use anyhow::{Context as _, bail};
use std::{path::Path, time::SystemTime};
use tapgate_vmm::image::{self, Image, Manifest};

/// The image of this name that this very program would build, else the newest whole one.
///
/// # Errors
/// There is none; the message says why the nearest one is unusable.
pub fn find(folder: &Path, name: &str) -> anyhow::Result<Image> {
    let mut found: Vec<_> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| Manifest::load(path).is_ok_and(|manifest| manifest.name == name))
        .collect();
    let own = image::recipe_hash();
    found.sort_by_key(|path| {
        let foreign = !Manifest::load(path).is_ok_and(|manifest| manifest.recipe == own);
        let changed = path.metadata().and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        (foreign, std::cmp::Reverse(changed))
    });
    match found.first() {
        Some(newest) => Ok(image::open(newest)?),
        None => {
            bail!("there is no image `{name}` in {}; build it with `tapgate image build`", folder.display())
        }
    }
}

/// Options of `tapgate image`.
#[derive(clap::Subcommand, Debug)]
pub enum Args {
    /// Build the base image debian-12 unless it is there
    Build {
        /// Where images are kept
        #[arg(long, env = "TAPGATE_IMAGE_DIR", default_value = "/var/cache/tapgate/images")]
        image_dir: std::path::PathBuf,
    },
}

/// Runs `tapgate image`.
///
/// # Errors
/// The image cannot be built.
pub fn run(args: Args) -> anyhow::Result<()> {
    let Args::Build { image_dir } = args;
    std::fs::create_dir_all(&image_dir).with_context(|| format!("cannot make {}", image_dir.display()))?;
    let image = image::build_debian12(&image_dir)?;
    println!("{}", image.dir().display());
    Ok(())
}
