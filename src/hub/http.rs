//! Requests with retries, and what can go wrong with them.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use ureq::ResponseExt as _;

use super::Token;

/// Tries of one request before giving up.
pub(super) const TRIES: u32 = 4;

/// Longest pause of our own.
const LONGEST_PAUSE: Duration = Duration::from_secs(20);

/// Longest pause that a server can ask for; the public hub counts requests in windows of five
/// minutes.
const LONGEST_ASKED: Duration = Duration::from_secs(300);

/// The same where nobody can be asked whether to go on.
const LONGEST_BLIND: Duration = Duration::from_secs(60);

/// Longest answer of an API route, in bytes.
const LONGEST_JSON: u64 = 256 << 20;

/// Why a request failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// No connection: the cause.
    Unreachable(String),
    /// An answer that is not a success.
    Status {
        /// HTTP status.
        code: u16,
        /// `X-Error-Code`, or empty.
        error: String,
        /// `X-Error-Message` as ` (…)`, or empty.
        reason: String,
    },
    /// The answer broke off, or is not what was asked for: the cause.
    Broken(String),
}

/// An answer of an API route.
pub(super) struct Page {
    /// The body.
    pub(super) value: Value,
    /// URL of the next page (`Link: <…>; rel="next"`).
    pub(super) next: Option<String>,
}

pub(super) type Response = ureq::http::Response<ureq::Body>;

/// Requests to one hub.
#[derive(Debug)]
pub(super) struct Http {
    agent: ureq::Agent,
    endpoint: String,
    token: Option<Token>,
    backoff: Duration,
    /// Whether anything was answered yet: then a lost connection is a passing fault, else it is
    /// a wrong address or a machine without a network.
    reached: AtomicBool,
}

impl Http {
    pub(super) fn new(endpoint: &str, token: Option<Token>, backoff: Duration) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(ureq::config::RedirectAuthHeaders::SameHost)
            .user_agent(concat!("flow/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .build()
            .into();
        let reached = AtomicBool::new(false);
        Self { agent, endpoint: endpoint.to_owned(), token, backoff, reached }
    }

    pub(super) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    #[cfg(test)]
    pub(super) fn set_backoff(&mut self, backoff: Duration) {
        self.backoff = backoff;
    }

    /// The pause before try `n` (from 1): a third of the next, and at least what the server
    /// asked for.
    pub(super) fn pause(&self, n: u32, asked: Option<Duration>) -> Duration {
        let own = self.backoff * 3u32.pow(n.min(TRIES).saturating_sub(1));
        let own = own.min(LONGEST_PAUSE);
        asked.map_or(own, |d| d.max(own)).min(LONGEST_ASKED)
    }

    /// Whether asking again may help.
    pub(super) fn passes(&self, failure: &Failure) -> bool {
        match failure {
            Failure::Unreachable(_) => self.reached.load(Ordering::Relaxed),
            Failure::Status { code, .. } => *code == 408 || *code == 429 || *code >= 500,
            Failure::Broken(_) => true,
        }
    }

    /// One GET, of the bytes from `start` on, or of all of them if what is there is not what
    /// `validator` says (`If-Range`); any status of 400 and above is a failure. The token
    /// goes to the hub's own routes and nowhere else.
    pub(super) fn get_once(
        &self,
        url: &str,
        start: u64,
        validator: Option<&str>,
    ) -> Result<Response, (Failure, Option<Duration>)> {
        // A body that was packed on the way has another digest.
        let mut request = self.agent.get(url).header("Accept-Encoding", "identity");
        let own = url.strip_prefix(&self.endpoint).is_some_and(|rest| rest.starts_with('/'));
        if let Some(token) = self.token.as_ref().filter(|_| own) {
            request = request.header("Authorization", format!("Bearer {}", token.reveal()));
        }
        if start > 0 {
            request = request.header("Range", format!("bytes={start}-"));
            if let Some(validator) = validator {
                request = request.header("If-Range", validator);
            }
        }
        let response = request.call().map_err(|e| (classify(e), None))?;
        self.reached.store(true, Ordering::Relaxed);
        let code = response.status().as_u16();
        if code < 400 {
            return Ok(response);
        }
        let error = header(&response, "x-error-code").unwrap_or_default();
        let reason = header(&response, "x-error-message").map(|m| format!(" ({m})"));
        let after = header(&response, "retry-after").and_then(|text| after(&text));
        let window = || header(&response, "ratelimit").and_then(|text| window(&text));
        let wait = after.or_else(|| (code == 429).then(window).flatten());
        let reason = reason.unwrap_or_default();
        Err((Failure::Status { code, error, reason }, wait))
    }

    /// An API route.
    pub(super) fn json(&self, url: &str) -> Result<Page, Failure> {
        let mut tried = 1;
        loop {
            let (failure, wait) = match self.json_once(url) {
                Ok(page) => return Ok(page),
                Err(failed) => failed,
            };
            if !self.passes(&failure) || tried >= TRIES {
                return Err(failure);
            }
            std::thread::sleep(self.pause(tried, wait).min(LONGEST_BLIND));
            tried += 1;
        }
    }

    fn json_once(&self, url: &str) -> Result<Page, (Failure, Option<Duration>)> {
        let mut response = self.get_once(url, 0, None)?;
        let next = header(&response, "link").and_then(|link| next_page(&link));
        let next = next.map(|to| if to.starts_with('/') { self.host(&response) + &to } else { to });
        let body = response.body_mut().with_config().limit(LONGEST_JSON).read_to_vec();
        let body = body.map_err(|e| (Failure::Broken(e.to_string()), None))?;
        let value = serde_json::from_slice(&body);
        let value = value.map_err(|e| (Failure::Broken(format!("not JSON: {e}")), None))?;
        Ok(Page { value, next })
    }

    fn host(&self, response: &Response) -> String {
        let uri = response.get_uri();
        match (uri.scheme_str(), uri.authority()) {
            (Some(scheme), Some(authority)) => format!("{scheme}://{authority}"),
            _ => self.endpoint.clone(),
        }
    }
}

/// A header's text.
pub(super) fn header(response: &Response, name: &str) -> Option<String> {
    response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned)
}

/// `Retry-After`: seconds, or the time of day from which on to ask again.
fn after(text: &str) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let then = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
    // A time that has passed means at once.
    Some(Duration::try_from(then.duration_since(jiff::Timestamp::now())).unwrap_or_default())
}

/// Seconds until the window of `RateLimit: "api";r=0;t=55` ends.
fn window(text: &str) -> Option<Duration> {
    let seconds = text.split(';').find_map(|part| part.trim().strip_prefix("t="))?;
    seconds.parse().ok().map(Duration::from_secs)
}

fn next_page(link: &str) -> Option<String> {
    let next = link.split(',').find(|part| part.contains("rel=\"next\""))?;
    let (_, rest) = next.split_once('<')?;
    rest.split_once('>').map(|(url, _)| url.to_owned())
}

fn classify(error: ureq::Error) -> Failure {
    use std::io::ErrorKind as K;
    let text = error.to_string();
    match error {
        ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve)
        | ureq::Error::BadUri(_)
        | ureq::Error::Tls(_)
        | ureq::Error::Rustls(_)
        | ureq::Error::InvalidProxyUrl
        | ureq::Error::ConnectProxyFailed(_) => Failure::Unreachable(text),
        ureq::Error::Io(e) => match e.kind() {
            K::ConnectionReset | K::ConnectionAborted | K::BrokenPipe | K::UnexpectedEof => {
                Failure::Broken(text)
            }
            _ => Failure::Unreachable(text),
        },
        _ => Failure::Broken(text),
    }
}

/// A path segment as it stands in a URL: all but unreserved characters as `%XX`.
pub(super) fn encode(segment: &str) -> String {
    let mut out = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_what_the_server_asks_for() {
        assert_eq!(after(" 7 "), Some(Duration::from_secs(7)));
        assert_eq!(after("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(100);
        let soon = soon.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        let asked = after(&soon).unwrap();
        assert!((90..=100).contains(&asked.as_secs()), "{asked:?} for {soon}");
        assert_eq!(after("tomorrow"), None);
        assert_eq!(window("\"api\";r=0;t=55"), Some(Duration::from_secs(55)));
        let http = Http::new("http://x", None, Duration::from_millis(300));
        assert_eq!(http.pause(2, None), Duration::from_millis(900));
        assert_eq!(http.pause(1, Some(Duration::from_secs(55))), Duration::from_secs(55));
        assert_eq!(http.pause(1, Some(Duration::from_secs(9999))), LONGEST_ASKED);
    }
}
