//! The ConfigMaps and Secrets that pods refer to, read from the API server once for all pods of the node.

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{ConfigMap, Container, Secret};
use kube::api::Api;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How old an object may be that a running pod's files are brought up to date with. A change takes this long to be seen,
/// and then until the pod's next refresh.
pub const MAX_AGE: Duration = Duration::from_secs(30);
/// Bytes of objects that are remembered; an object has up to 1 MiB.
const MAX_KEPT: usize = 16 << 20;
/// Bytes of objects that one container's environment, or one volume, may come from. All of them are in memory at once.
const MAX_WANTED: usize = 64 << 20;
/// Objects that are asked for at once for one of them.
const CONCURRENT: usize = 8;

/// Why a pod's configuration cannot be given to it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Something that may still appear: the container waits and tries again.
    #[error("{0}")]
    Missing(String),
    /// Something that stays wrong until the pod is changed.
    #[error("{0}")]
    Invalid(String),
}

/// Names of the ConfigMaps and Secrets that something refers to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    pub config_maps: BTreeSet<String>,
    pub secrets: BTreeSet<String>,
}

impl Wanted {
    pub fn count(&self) -> usize {
        self.config_maps.len() + self.secrets.len()
    }

    pub fn by_environment(container: &Container) -> Self {
        let mut wanted = Self::default();
        for source in container.env_from.iter().flatten() {
            wanted.config_maps.extend(source.config_map_ref.iter().map(|r| r.name.clone()));
            wanted.secrets.extend(source.secret_ref.iter().map(|r| r.name.clone()));
        }
        for source in container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref()) {
            wanted.config_maps.extend(source.config_map_key_ref.iter().map(|r| r.name.clone()));
            wanted.secrets.extend(source.secret_key_ref.iter().map(|r| r.name.clone()));
        }
        wanted
    }
}

/// The ConfigMaps and Secrets of one namespace that were asked for; those that do not exist are absent.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    pub namespace: String,
    pub config_maps: BTreeMap<String, Arc<ConfigMap>>,
    pub secrets: BTreeMap<String, Arc<Secret>>,
}

impl Sources {
    pub fn config_map(&self, name: &str, optional: bool) -> Result<Option<&ConfigMap>, ConfigError> {
        self.found("ConfigMap", name, self.config_maps.get(name).map(Arc::as_ref), optional)
    }

    pub fn secret(&self, name: &str, optional: bool) -> Result<Option<&Secret>, ConfigError> {
        self.found("Secret", name, self.secrets.get(name).map(Arc::as_ref), optional)
    }

    fn found<'a, K>(
        &self,
        kind: &str,
        name: &str,
        object: Option<&'a K>,
        optional: bool,
    ) -> Result<Option<&'a K>, ConfigError> {
        match object {
            None if !optional => Err(ConfigError::Missing(format!(
                "{kind} {}/{name} does not exist; create it, or mark the reference optional",
                self.namespace
            ))),
            object => Ok(object),
        }
    }
}

/// What the API server said about one object, and when it was asked.
#[derive(Debug, Clone)]
struct Answer<K> {
    asked: Instant,
    object: Result<Option<Arc<K>>, ConfigError>,
}

/// The last answer about one object. Who asks the API server holds the lock, so that the others wait for its answer.
type Slot<K> = Arc<tokio::sync::Mutex<Option<Answer<K>>>>;

struct Kept<K> {
    slot: Slot<K>,
    bytes: usize,
    asked: Instant,
}

/// The objects of one kind, by namespace and name.
struct Shelf<K> {
    kept: Mutex<HashMap<(String, String), Kept<K>>>,
}

impl<K> Default for Shelf<K> {
    fn default() -> Self {
        Self { kept: Mutex::default() }
    }
}

trait Object:
    kube::Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + serde::de::DeserializeOwned
{
    const KIND: &'static str;

    /// Bytes of what it holds.
    fn size(&self) -> usize;
}

impl Object for ConfigMap {
    const KIND: &'static str = "ConfigMap";

    fn size(&self) -> usize {
        let text = self.data.iter().flatten().map(|(key, value)| key.len() + value.len());
        text.chain(self.binary_data.iter().flatten().map(|(key, value)| key.len() + value.0.len())).sum()
    }
}

impl Object for Secret {
    const KIND: &'static str = "Secret";

    fn size(&self) -> usize {
        self.data.iter().flatten().map(|(key, value)| key.len() + value.0.len()).sum()
    }
}

impl<K: Object> Shelf<K> {
    /// The object as it was at `not_before` or later; none when it does not exist.
    async fn get(
        &self,
        client: &kube::Client,
        namespace: &str,
        name: &str,
        not_before: Instant,
    ) -> Result<Option<Arc<K>>, ConfigError> {
        let key = (namespace.to_owned(), name.to_owned());
        let slot = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            let new = || Kept { slot: Slot::default(), bytes: 0, asked: Instant::now() };
            kept.entry(key.clone()).or_insert_with(new).slot.clone()
        };
        let mut answer = slot.lock().await;
        if let Some(answer) = &*answer
            && answer.asked >= not_before
        {
            return answer.object.clone();
        }
        let asked = Instant::now();
        let api: Api<K> = Api::namespaced(client.clone(), namespace);
        let object = match while_forbidden(|| api.get(name)).await {
            Ok(object) => Ok(Some(Arc::new(object))),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(None),
            Err(error) => Err(ConfigError::Missing(format!("failed to read {} {namespace}/{name}: {error}", K::KIND))),
        };
        *answer = Some(Answer { asked, object: object.clone() });
        drop(answer);
        let bytes = object.as_ref().ok().and_then(Option::as_ref).map_or(0, |object| object.size());
        self.keep(key, Kept { slot, bytes, asked });
        object
    }

    /// Remembers an answer, and forgets what is old, or everything else where that is too much.
    fn keep(&self, key: (String, String), new: Kept<K>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.insert(key.clone(), new);
        kept.retain(|_, kept| kept.asked.elapsed() < MAX_AGE);
        if kept.values().map(|kept| kept.bytes).sum::<usize>() > MAX_KEPT {
            kept.retain(|other, _| *other == key);
        }
    }
}

/// Reads ConfigMaps and Secrets for all pods of the node: those who want the same object at the same time share one
/// answer, however many they are.
pub struct Objects {
    client: kube::Client,
    config_maps: Shelf<ConfigMap>,
    secrets: Shelf<Secret>,
}

impl Objects {
    pub fn new(client: kube::Client) -> Self {
        Self { client, config_maps: Shelf::default(), secrets: Shelf::default() }
    }

    pub fn client(&self) -> &kube::Client {
        &self.client
    }

    /// Everything that is wanted, none of it older than `not_before`.
    ///
    /// Fails with [`ConfigError::Missing`] when the API server does not answer, and with [`ConfigError::Invalid`] when it is
    /// too much.
    pub async fn read(&self, namespace: &str, wanted: &Wanted, not_before: Instant) -> Result<Sources, ConfigError> {
        let mut left = MAX_WANTED;
        let config_maps =
            self.read_all(&self.config_maps, namespace, &wanted.config_maps, not_before, &mut left).await?;
        let secrets = self.read_all(&self.secrets, namespace, &wanted.secrets, not_before, &mut left).await?;
        Ok(Sources { namespace: namespace.to_owned(), config_maps, secrets })
    }

    async fn read_all<K: Object>(
        &self,
        shelf: &Shelf<K>,
        namespace: &str,
        names: &BTreeSet<String>,
        not_before: Instant,
        left: &mut usize,
    ) -> Result<BTreeMap<String, Arc<K>>, ConfigError> {
        use futures::StreamExt as _;
        let read = |name: &String| {
            let name = name.clone();
            async move { shelf.get(&self.client, namespace, &name, not_before).await.map(|object| (name, object)) }
        };
        let reads: Vec<_> = names.iter().map(read).collect();
        let mut reads = std::pin::pin!(futures::stream::iter(reads).buffered(CONCURRENT));
        let mut found = BTreeMap::new();
        while let Some(read) = reads.next().await {
            let (name, object) = read?;
            let Some(object) = object else { continue };
            *left = left.checked_sub(object.size()).ok_or_else(|| {
                ConfigError::Invalid(format!(
                    "{} {namespace}/{name}: a volume, or a container's environment, refers to more than {} MiB of \
                     ConfigMaps and Secrets",
                    K::KIND,
                    MAX_WANTED >> 20
                ))
            })?;
            found.insert(name, object);
        }
        Ok(found)
    }
}

pub fn missing_key(kind: &str, sources: &Sources, name: &str, key: &str) -> ConfigError {
    ConfigError::Missing(format!("{kind} {}/{name} has no key {key:?}", sources.namespace))
}

/// Repeats a call for a moment while it is forbidden.
///
/// The node authorizer learns of a new pod from a watch of its own, often a little later than the node does; until
/// then it denies the node what the pod refers to.
pub async fn while_forbidden<T, F>(call: impl Fn() -> F) -> kube::Result<T>
where
    F: Future<Output = kube::Result<T>>,
{
    let mut pause = Duration::from_millis(10);
    loop {
        match call().await {
            Err(kube::Error::Api(status)) if status.is_forbidden() && pause < Duration::from_millis(500) => {
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            result => return result,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::pod::testing::Cluster;
    use serde_json::json;

    fn wanted(names: &[&str]) -> Wanted {
        Wanted { config_maps: names.iter().map(|name| (*name).to_owned()).collect(), ..Wanted::default() }
    }

    #[tokio::test]
    async fn many_pods_that_want_an_object_at_the_same_time_are_one_request() {
        let cluster = Cluster::default();
        cluster.put("configmaps", "c", json!({"data": {"a": "1"}}));
        let objects = Objects::new(cluster.client());
        let begin = Instant::now();
        let read = || async { objects.read("shop", &wanted(&["c"]), begin).await.unwrap() };
        let all = futures::future::join_all((0..500).map(|_| read())).await;
        assert!(all.iter().all(|sources| sources.config_map("c", false).unwrap().is_some()));
        assert_eq!(cluster.reads(), 1);
        objects.read("shop", &wanted(&["c"]), Instant::now()).await.unwrap();
        assert_eq!(cluster.reads(), 2, "what may not be older is read anew");
    }

    #[tokio::test]
    async fn a_change_made_before_a_pod_asks_is_what_it_gets() {
        let cluster = Cluster::default();
        let objects = Objects::new(cluster.client());
        for value in ["1", "2", "3"] {
            cluster.put("configmaps", "c", json!({"data": {"a": value}}));
            let sources = objects.read("shop", &wanted(&["c"]), Instant::now()).await.unwrap();
            assert_eq!(sources.config_maps["c"].data.as_ref().unwrap()["a"], value);
        }
        assert!(objects.read("shop", &wanted(&["none"]), Instant::now()).await.unwrap().config_maps.is_empty());
    }

    #[tokio::test]
    async fn what_is_remembered_and_what_is_read_at_once_are_bounded() {
        let cluster = Cluster::default();
        let names: Vec<String> = (0..70).map(|number| format!("c{number}")).collect();
        for name in &names {
            cluster.put("configmaps", name, json!({"data": {"a": "x".repeat(1 << 20)}}));
        }
        let objects = Objects::new(cluster.client());
        let all = Wanted { config_maps: names.iter().cloned().collect(), ..Wanted::default() };
        let error = objects.read("shop", &all, Instant::now()).await.unwrap_err();
        assert!(matches!(&error, ConfigError::Invalid(m) if m.contains("64 MiB")), "{error}");
        let kept = objects.config_maps.kept.lock().unwrap();
        let bytes: usize = kept.values().map(|kept| kept.bytes).sum();
        assert!(bytes <= MAX_KEPT, "{bytes}");
    }
}
