//! Where a repository is cloned from: `owner/repo` at the default host, `host/path`, or an `https://` URL.
//!
//! Credentials never stand in the URL: they are secrets, which the guest only has placeholders for.

use tapgate_model::HostName;
use url::Url;

/// Why a text names no repository that can be cloned.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub(crate) enum RepoError {
    /// Not one of the three forms.
    #[error("`repo` must be like owner/repo, git.example.com/team/repo or https://git.example.com/team/repo")]
    Form,
    /// By SSH, which no secret can be put into.
    #[error(
        "`repo` must be reached by HTTPS: SSH carries no secret through the proxy; write https://HOST/PATH"
    )]
    Ssh,
    /// Password in the URL.
    #[error("`repo` must not hold a password; make it a secret whose hosts name the repository's host")]
    Password,
    /// An address instead of a name.
    #[error("`repo` must name its host; rules and secrets are by name")]
    Host,
}

/// A repository that can be cloned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CloneUrl {
    url: String,
    directory: String,
}

impl CloneUrl {
    /// Reads any of the three forms.
    pub(crate) fn parse(text: &str, default_host: &str) -> Result<Self, RepoError> {
        if text.is_empty() || text.chars().any(|c| c.is_control() || c.is_whitespace() || c == '\\') {
            return Err(RepoError::Form);
        }
        if text.starts_with("ssh://") || text.starts_with("git://") || is_scp_like(text) {
            return Err(RepoError::Ssh);
        }
        let absolute = if text.contains("://") { text.to_owned() } else { short(text, default_host)? };
        let url = Url::parse(&absolute).map_err(|_| RepoError::Form)?;
        if !matches!(url.scheme(), "https" | "http") || url.query().is_some() || url.fragment().is_some() {
            return Err(RepoError::Form);
        }
        if url.password().is_some() {
            return Err(RepoError::Password);
        }
        let host = url.host_str().ok_or(RepoError::Form)?;
        HostName::parse(host).map_err(|_| RepoError::Host)?;
        let last = url.path().trim_matches('/').rsplit('/').next().unwrap_or("");
        if last.is_empty() {
            return Err(RepoError::Form);
        }
        Ok(Self { directory: folder(last), url: url.to_string() })
    }

    /// For `git clone`.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// A folder's name that means nothing but itself.
    pub(crate) fn directory(&self) -> &str {
        &self.directory
    }
}

/// `user@host:path`, as SSH has it.
fn is_scp_like(text: &str) -> bool {
    let before_path = text.split('/').next().unwrap_or("");
    !text.contains("://") && before_path.contains('@') && before_path.contains(':')
}

fn short(text: &str, default_host: &str) -> Result<String, RepoError> {
    let (first, rest) = text.split_once('/').ok_or(RepoError::Form)?;
    if first.is_empty() || rest.trim_matches('/').is_empty() {
        return Err(RepoError::Form);
    }
    match first.contains('.') || first.contains(':') {
        true => Ok(format!("https://{text}")),
        false if rest.trim_end_matches('/').contains('/') => Err(RepoError::Form),
        false => Ok(format!("https://{default_host}/{text}")),
    }
}

fn folder(last: &str) -> String {
    let name = last.strip_suffix(".git").unwrap_or(last);
    let plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let name: String = name.chars().filter(plain).take(64).collect();
    let name = name.trim_start_matches(['.', '-']);
    if name.is_empty() { "project".to_owned() } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(String, String), RepoError> {
        CloneUrl::parse(text, "github.com").map(|clone| (clone.url, clone.directory))
    }

    #[test]
    fn three_forms_name_a_repository() {
        let org = ("https://github.com/org/repo".to_owned(), "repo".to_owned());
        assert_eq!(parse("org/repo").unwrap(), org);
        assert_eq!(parse("github.com/org/repo").unwrap(), org);
        assert_eq!(parse("https://github.com/org/repo").unwrap(), org);
        assert_eq!(parse("https://git.example.com:8443/a/b/c.git").unwrap().1, "c");
        assert_eq!(parse("https://me@git.example.com/r").unwrap().0, "https://me@git.example.com/r");
    }

    #[test]
    fn what_is_no_repository_is_refused_with_what_to_write() {
        use RepoError::{Form, Host, Password, Ssh};
        for (text, error) in [
            ("repo", Form),
            ("", Form),
            ("a/b/c", Form),
            ("/a/b", Form),
            ("org/", Form),
            ("--upload-pack=x", Form),
            ("https://github.com/", Form),
            ("https://github.com/a?b", Form),
            ("file:///etc", Form),
            ("ext::sh -c id", Form),
            ("git@github.com:org/repo", Ssh),
            ("ssh://git@github.com/org/repo", Ssh),
            ("https://me:token@github.com/org/repo", Password),
            ("https://192.0.2.1/org/repo", Host),
            ("https://[2001:db8::1]/org/repo", Host),
            ("169.254.169.254/latest", Host),
        ] {
            assert_eq!(parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn a_folder_is_never_a_path_or_an_option() {
        for (text, folder) in [
            ("o/..", "project"),
            ("o/-rf", "rf"),
            ("o/.git", "project"),
            ("github.com/o/%2e%2e%2fx", "2e2e2fx"),
        ] {
            if let Ok((_, found)) = parse(text) {
                assert_eq!(found, folder, "{text}");
            }
        }
    }
}
