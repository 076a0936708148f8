/* Threads that share the jobs of a loop, and the calls that Python makes.

   The calling thread works too. Each thread draws the next job under one lock: a job takes tens of
   microseconds at least, so the lock is free nearly always. */

#include "native.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { SPINS = 2000 };
/* Polls of a thread before it sleeps, some tens of microseconds: the next loop follows soon. */

typedef void work(const void *task, long job, uint8_t *scratch);

struct crew {
  pthread_mutex_t lock;
  pthread_cond_t more, done; /* there are jobs, or the crew ends; the last job is done */
  pthread_t *threads;
  int others;
  bool ends;
  work *work;
  const void *task;
  long next, jobs;
  atomic_long open;  /* jobs that are not done; 0 between two loops */
  atomic_uint loops; /* counts the loops: a thread that polls sees the next one begin */
  uint8_t *scratch;
  int64_t scratch_bytes; /* of one thread */
  atomic_int numbers;
};

static void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

/* Draw and do jobs until none is left. Called, and returns, with the lock held. */
static void drain(struct crew *crew, uint8_t *scratch) {
  while (crew->next < crew->jobs) {
    long job = crew->next++;
    pthread_mutex_unlock(&crew->lock);
    crew->work(crew->task, job, scratch);
    pthread_mutex_lock(&crew->lock);
    if (atomic_fetch_sub(&crew->open, 1) == 1) pthread_cond_signal(&crew->done);
  }
}

static void *serve(void *given) {
  struct crew *crew = given;
  uint8_t *scratch = crew->scratch + atomic_fetch_add(&crew->numbers, 1) * crew->scratch_bytes;
  pthread_mutex_lock(&crew->lock);
  while (!crew->ends) {
    drain(crew, scratch);
    unsigned seen = atomic_load(&crew->loops);
    pthread_mutex_unlock(&crew->lock);
    for (int i = 0; i < SPINS && atomic_load(&crew->loops) == seen; i++) relax();
    pthread_mutex_lock(&crew->lock);
    while (!crew->ends && crew->next >= crew->jobs) pthread_cond_wait(&crew->more, &crew->lock);
  }
  pthread_mutex_unlock(&crew->lock);
  return NULL;
}

static void run_loop(struct crew *crew, work *work, const void *task, long jobs) {
  if (jobs < 1) return;
  pthread_mutex_lock(&crew->lock);
  crew->work = work, crew->task = task, crew->next = 0, crew->jobs = jobs;
  atomic_store(&crew->open, jobs);
  atomic_fetch_add(&crew->loops, 1);
  if (jobs > 1) pthread_cond_broadcast(&crew->more);
  drain(crew, crew->scratch);
  pthread_mutex_unlock(&crew->lock);
  for (int i = 0; i < SPINS && atomic_load(&crew->open); i++) relax();
  pthread_mutex_lock(&crew->lock);
  while (atomic_load(&crew->open)) pthread_cond_wait(&crew->done, &crew->lock);
  pthread_mutex_unlock(&crew->lock);
}

/* ---- what Python calls --------------------------------------------------------------------- */

void kgrc_crew_free(struct crew *crew) {
  pthread_mutex_lock(&crew->lock);
  crew->ends = true;
  pthread_cond_broadcast(&crew->more);
  pthread_mutex_unlock(&crew->lock);
  for (int i = 0; i < crew->others; i++) pthread_join(crew->threads[i], NULL);
  pthread_cond_destroy(&crew->more);
  pthread_cond_destroy(&crew->done);
  pthread_mutex_destroy(&crew->lock);
  free(crew->threads);
  free(crew);
}

/* A crew of `count` threads, this one among them; fewer if the system starts no more. NULL if there
   is no memory. `scratch` has `scratch_bytes` for each. */
struct crew *kgrc_crew_new(int count, uint8_t *scratch, int64_t scratch_bytes) {
  struct crew *crew = calloc(1, sizeof *crew);
  if (!crew) return NULL;
  crew->threads = calloc(count, sizeof *crew->threads);
  if (!crew->threads) return free(crew), NULL;
  crew->scratch = scratch, crew->scratch_bytes = scratch_bytes;
  atomic_store(&crew->numbers, 1); /* 0 is the calling thread */
  pthread_mutex_init(&crew->lock, NULL);
  pthread_cond_init(&crew->more, NULL);
  pthread_cond_init(&crew->done, NULL);
  sigset_t all, before; /* signals are for Python's main thread */
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (int i = 0; i < count - 1; i++) {
    if (pthread_create(&crew->threads[crew->others], NULL, serve, crew)) break;
    crew->others++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return crew;
}

int kgrc_crew_threads(const struct crew *crew) { return crew->others + 1; }

/* The instructions of a name that this processor has; NULL if it has not, or there are none. */
const struct instructions *kgrc_instructions(const char *name) {
  if (!strcmp(name, "plain")) return &kgrc_plain;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(name, "avx2") && __builtin_cpu_supports("avx2")) return &kgrc_avx2;
  if (!strcmp(name, "vnni") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return &kgrc_vnni;
#endif
  return NULL;
}

struct bound { /* a task and the instructions that run it */
  const struct instructions *with;
  const void *task;
};

static void pad_job(const void *given, long job, uint8_t *scratch) {
  const struct bound *bound = given;
  (void)scratch;
  bound->with->pad(&((const struct convolution *)bound->task)->in, job);
}

static void convolve_job(const void *given, long job, uint8_t *scratch) {
  const struct bound *bound = given;
  bound->with->convolve(bound->task, job, scratch);
}

static void spread_job(const void *given, long job, uint8_t *scratch) {
  const struct bound *bound = given;
  (void)scratch;
  bound->with->spread(bound->task, job);
}

static void connect_job(const void *given, long job, uint8_t *scratch) {
  const struct bound *bound = given;
  (void)scratch;
  bound->with->connect(bound->task, job);
}

static void pool_job(const void *given, long job, uint8_t *scratch) {
  const struct bound *bound = given;
  bound->with->pool(bound->task, job, scratch);
}

static int64_t ceil_div(int64_t dividend, int64_t divisor) {
  return (dividend + divisor - 1) / divisor;
}

void kgrc_convolve(struct crew *crew, const struct instructions *with,
                   const struct convolution *task) {
  struct bound bound = {with, task};
  run_loop(crew, pad_job, &bound, (long)task->in.quads * task->in.stride[0] * task->in.length[0]);
  int64_t regions = (task->out[0] / task->pool[0]) * ceil_div(task->out[1], task->region_rows);
  run_loop(crew, convolve_job, &bound, regions * ceil_div(task->blocks, task->blocks_per_job));
}

void kgrc_connect(struct crew *crew, const struct instructions *with,
                  const struct connected *task) {
  struct bound bound = {with, task};
  run_loop(crew, spread_job, &bound, 1);
  run_loop(crew, connect_job, &bound, ceil_div(task->filters, BLOCK));
}

void kgrc_pool(struct crew *crew, const struct instructions *with, const struct pool *task) {
  struct bound bound = {with, task};
  run_loop(crew, pool_job, &bound, (long)task->quads * task->out[0]);
}

/* The sizes of the structures, which Python compares with its own. */
void kgrc_sizes(int64_t *sizes) {
  sizes[0] = sizeof(struct convolution);
  sizes[1] = sizeof(struct connected);
  sizes[2] = sizeof(struct pool);
}

/* Tells which sources this library was built from: library.py looks for it in the file. */
const char kgrc_sources[] = "pynq_kgrc kernels " KGRC_SOURCES;
