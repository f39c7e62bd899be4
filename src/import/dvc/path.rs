//! Paths of a project, without looking at the disk.

use std::path::Path;

/// A normalised path, relative to the folder of `dvc.yaml`; it may lead above that.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    // In this order what lies in a folder sorts right behind it.
    /// From the root of the file system.
    absolute: bool,
    above: usize,
    parts: Vec<String>,
}

/// What is not a path.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outside {
    Url,
    Not(String),
}

impl Place {
    /// The folder itself.
    pub(super) fn here() -> Self {
        Self { above: 0, parts: Vec::new(), absolute: false }
    }

    /// What a path means in this folder.
    ///
    /// # Errors
    /// When it is a URL, or empty.
    pub(super) fn join(&self, path: &str) -> Result<Self, Outside> {
        if path.contains("://") {
            return Err(Outside::Url);
        }
        if path.trim().is_empty() || path.contains(['\0', '\n', '\\']) {
            return Err(Outside::Not(format!("`{}` is not a path", path.escape_debug())));
        }
        let absolute = path.starts_with('/');
        let mut place = if absolute { Self { absolute, ..Self::here() } } else { self.clone() };
        for part in path.split('/') {
            match part {
                "" | "." => {}
                ".." if place.parts.pop().is_some() => {}
                ".." if place.absolute => {}
                ".." => place.above += 1,
                part => place.parts.push(part.to_owned()),
            }
        }
        Ok(place)
    }

    pub(super) fn is_here(&self) -> bool {
        self.parts.is_empty() && self.above == 0 && !self.absolute
    }

    pub(super) fn is_absolute(&self) -> bool {
        self.absolute
    }

    /// How many folders it leads up.
    pub(super) fn above(&self) -> usize {
        self.above
    }

    /// As written from the folder of `dvc.yaml`.
    pub(super) fn text(&self) -> String {
        let up = std::iter::repeat_n("..", self.above);
        let text = up.chain(self.parts.iter().map(String::as_str)).collect::<Vec<_>>().join("/");
        match (self.absolute, text.is_empty()) {
            (true, _) => format!("/{text}"),
            (false, true) => ".".to_owned(),
            (false, false) => text,
        }
    }

    /// As written from a folder above, of which the last parts are given. What lies elsewhere gets
    /// a folder of its own.
    pub(super) fn below(&self, folder: &[String]) -> String {
        if self.absolute {
            return format!(".outside/{}", self.parts.join("/"));
        }
        let kept = folder.len().saturating_sub(self.above);
        let parts = folder[..kept].iter().chain(&self.parts).map(String::as_str);
        let text = parts.collect::<Vec<_>>().join("/");
        if text.is_empty() { ".".to_owned() } else { text }
    }

    /// Whether it is the other, or lies in it.
    pub(super) fn is_in(&self, other: &Self) -> bool {
        (self.absolute, self.above) == (other.absolute, other.above)
            && self.parts.starts_with(&other.parts)
    }

    /// The folders that it lies in, the nearest last.
    pub(super) fn folders(&self) -> impl Iterator<Item = Self> {
        (0..self.parts.len()).map(|n| Self { parts: self.parts[..n].to_vec(), ..self.clone() })
    }

    /// An item of this folder.
    pub(super) fn child(&self, name: &str) -> Self {
        let mut child = self.clone();
        child.parts.push(name.to_owned());
        child
    }
}

/// The way from one folder to another, both absolute and without `..`.
pub(super) fn way(from: &Path, to: &Path) -> String {
    let (a, b): (Vec<_>, Vec<_>) = (from.components().collect(), to.components().collect());
    let same = a.iter().zip(&b).take_while(|(x, y)| x == y).count();
    let up = a[same..].iter().map(|_| "..".to_owned());
    let down = b[same..].iter().map(|part| part.as_os_str().to_string_lossy().into_owned());
    up.chain(down).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let src = Place::here().join("./src//").unwrap();
        let text = |path: &str| src.join(path).unwrap().text();
        assert_eq!(text("a.py"), "src/a.py");
        assert_eq!(text("../data"), "data");
        assert_eq!(text("../../x"), "../x");
        assert_eq!(text("/etc/x"), "/etc/x");
        assert_eq!(text("/../x"), "/x");
        assert_eq!(src.join(".."), Ok(Place::here()));
        assert_eq!(src.join("s3://b/x"), Err(Outside::Url));
        assert!(src.join("").is_err());
        let folder = ["up".to_owned(), "here".to_owned()];
        assert_eq!(src.join("../../x").unwrap().below(&folder), "up/x");
        assert_eq!(src.below(&folder), "up/here/src");
        assert_eq!(src.join("/a/b").unwrap().below(&folder), ".outside/a/b");
        assert!(src.join("a").unwrap().is_in(&src) && !src.is_in(&src.child("a")));
        assert!(!Place::here().join("srcs").unwrap().is_in(&src));
        assert_eq!(way(Path::new("/a/b"), Path::new("/a/c/d")), "../c/d");
        assert_eq!(way(Path::new("/a"), Path::new("/a")), "");
    }
}
