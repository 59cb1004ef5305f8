//! `tapgate admin`: the operator's commands, on the data directory itself. Who may read it may do all this anyway.
//!
//! What changes files under a running daemon is refused while one runs; the rest goes through the database and holds at
//! once.

use crate::engine::strays;
use crate::http::{check_email, check_password, hash_password};
use anyhow::{Context as _, bail};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use tapgate_model::UserId;
use tapgate_store::{NewUser, SealKey, Store, now_us};
use zeroize::Zeroizing;

/// How long an invitation is good (microseconds).
const INVITED_FOR: i64 = 7 * 86_400_000_000;

/// Options of `tapgate admin`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    /// Where the daemon's state lives
    #[arg(
        long,
        global = true,
        env = "TAPGATE_DATA_DIR",
        value_name = "DIR",
        default_value = "/var/lib/tapgate"
    )]
    data_dir: PathBuf,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Accounts
    #[command(subcommand)]
    User(User),
    /// Print an invitation for an address, for where sign-up is by invitation
    Invite {
        /// The address that may sign up with it
        email: String,
    },
    /// Copy the databases into a new folder; the daemon may run. Keep seal.key elsewhere too
    Backup {
        /// The folder to make
        to: PathBuf,
    },
    /// Put a backup in place of the databases; the daemon must not run
    Restore {
        /// The folder that `backup` made
        from: PathBuf,
    },
    /// Make a new sealing key and seal everything anew; the daemon must not run
    RotateKey,
    /// Check the audit log for changes made outside of tapgate
    VerifyAudit,
}

#[derive(clap::Subcommand, Debug)]
enum User {
    /// List accounts
    List,
    /// Make an account; the password is asked for, or read from standard input. Prints its API key
    Create {
        /// Address
        email: String,
        /// First name
        #[arg(long, default_value = "-")]
        first_name: String,
        /// Last name
        #[arg(long, default_value = "-")]
        last_name: String,
    },
    /// Close an account: its keys are refused at once
    Disable {
        /// ID or address
        user: String,
    },
    /// Open a closed account again
    Enable {
        /// ID or address
        user: String,
    },
}

/// Runs an operator's command.
///
/// # Errors
/// What was asked for could not be done; the message says why.
pub fn run(args: Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(act(args))
}

/// Checks the audit log in a data directory: `tapgate audit verify`.
///
/// # Errors
/// It was changed, or cannot be read.
pub(crate) fn verify(data_dir: PathBuf) -> anyhow::Result<()> {
    run(Args { command: Command::VerifyAudit, data_dir })
}

async fn act(args: Args) -> anyhow::Result<()> {
    let folder = &args.data_dir;
    let key_file = folder.join("seal.key");
    if !key_file.exists() {
        if let Command::Restore { .. } = args.command {
            bail!(
                "{} is not there; put the seal.key of the backup's time in its place first",
                key_file.display()
            );
        }
        bail!("there is no tapgate in {}; name its folder with --data-dir", folder.display());
    }
    let open = || open(folder, &key_file);
    match args.command {
        Command::User(command) => user(&open()?, command).await,
        Command::Invite { email } => {
            check_email(&email).map_err(|error| anyhow::anyhow!(error.message))?;
            let email = email.trim().to_lowercase();
            say(&open()?.ticket("invite", &email, now_us() + INVITED_FOR))
        }
        Command::Backup { to } => {
            open()?.backup(&to).await?;
            say(&format!("backed up into {}; {} is not in it", to.display(), key_file.display()))
        }
        Command::Restore { from } => {
            let _lock = alone(folder)?;
            let aside = Store::restore(folder, &from, SealKey::load(&key_file)?)?;
            say(&format!("restored; what was there is in {}", aside.display()))?;
            let (living, vms) = (open()?.vms_living().await?, folder.join("vms"));
            for (vm, process) in strays::running(&vms, &living) {
                say(&format!(
                    "{vm} runs (process {process}), which these records do not know: the next daemon ends it; its disk stays in {}",
                    vms.join(vm.as_str()).display()
                ))?;
            }
            Ok(())
        }
        Command::RotateKey => {
            let _lock = alone(folder)?;
            let count = Store::rotate_key(folder, &key_file)?;
            say(&format!("sealed {count} values anew; back up {} now", key_file.display()))
        }
        Command::VerifyAudit => verify_audit(&open()?).await,
    }
}

/// The store beside the daemon, if one runs. Records of an older version are brought up to date, and never under a daemon that
/// knows the old form alone.
fn open(folder: &Path, key_file: &Path) -> anyhow::Result<Store> {
    let key = SealKey::load(key_file)?;
    let _lock = match Store::is_current(folder)? {
        true => None,
        false => Some(lock(folder)?.with_context(|| {
            format!(
                "a daemon of an older version runs on {}; restart it as this version ({}) first, or use its own binary",
                folder.display(),
                env!("CARGO_PKG_VERSION")
            )
        })?),
    };
    Ok(Store::open(folder, key)?)
}

async fn verify_audit(store: &Store) -> anyhow::Result<()> {
    match store.verify_audit().await? {
        Ok(count) => say(&format!("the audit log is whole: {count} events")),
        Err(what) => bail!("the audit log was changed outside of tapgate: {what}"),
    }
}

async fn user(store: &Store, command: User) -> anyhow::Result<()> {
    match command {
        User::List => {
            for user in store.users().await? {
                let state = if user.disabled { "disabled" } else { "enabled" };
                say(&format!("{}  {}  {state}", user.id, user.email))?;
            }
            Ok(())
        }
        User::Create { email, first_name, last_name } => {
            check_email(&email).map_err(|error| anyhow::anyhow!(error.message))?;
            let password = password()?;
            check_password(&password).map_err(|error| anyhow::anyhow!(error.message))?;
            let password = hash_password(password).await.map_err(|error| anyhow::anyhow!(error.message))?;
            let new = NewUser { first_name, last_name, email, password };
            let (_, key) = store.user_create(new, "admin").await?;
            say(&key.token)
        }
        User::Disable { user } => disable(store, &user, true).await,
        User::Enable { user } => disable(store, &user, false).await,
    }
}

async fn disable(store: &Store, given: &str, disabled: bool) -> anyhow::Result<()> {
    let id = match given.parse::<UserId>() {
        Ok(id) => id,
        Err(_) => {
            let found = store.user_by_email(given).await?;
            found.with_context(|| format!("there is no account {given}"))?.0.id
        }
    };
    store.user_disable(&id, disabled).await.with_context(|| format!("there is no account {given}"))
}

fn password() -> anyhow::Result<Zeroizing<String>> {
    use std::io::IsTerminal as _;
    let text = if std::io::stdin().is_terminal() {
        rpassword::prompt_password("Password: ")?
    } else {
        let mut text = String::new();
        std::io::stdin().read_line(&mut text)?;
        text
    };
    Ok(Zeroizing::new(text.trim_end_matches(['\r', '\n']).to_owned()))
}

/// The daemon's own lock: held by one process at a time. `None` if a daemon has it.
fn lock(folder: &Path) -> anyhow::Result<Option<nix::fcntl::Flock<std::fs::File>>> {
    let path = folder.join("lock");
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    Ok(nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock).ok())
}

fn alone(folder: &Path) -> anyhow::Result<nix::fcntl::Flock<std::fs::File>> {
    lock(folder)?.with_context(|| format!("a daemon runs on {}; stop it first", folder.display()))
}

fn say(text: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "{text}")?)
}
