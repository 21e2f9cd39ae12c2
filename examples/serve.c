/* serve.c - runs an AOTInductor package of an image classifier; there is no Python in the process.
 *
 *     python examples/serve.py                             # trains, writes build/serve/digits.pt2 and images.f32
 *     lib=$(python -c 'import torch; print(torch.__path__[0] + "/lib")')
 *     cc -std=c11 -O2 examples/serve.c -o serve -L$lib -Wl,-rpath,$lib -Wl,--no-as-needed -ltorch -ltorch_cpu -ldl -lm
 *     ./serve build/serve/digits.pt2 < build/serve/images.f32
 *
 * Images come as float32, one after the other; for each the class of the largest logit is printed, and its probability.
 *
 * A package is a zip whose members are stored as they are. One of them is the compiled model with its weights, a shared
 * library on torch's C ABI; another one holds what serve.py told of it, the shape of an image. Grassmann heads and
 * adapters are plain formulas in it: torch_subspace is not asked for. */
#define _GNU_SOURCE /* memfd_create, memmem */
#include <dlfcn.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BATCH = 64, MAX_DIM = 8 };

/* ---- torch's C ABI: torch/csrc/inductor/aoti_torch/c/shim.h, aoti_runtime/interface.h; 0 is success ---- */
typedef struct AtenTensorOpaque *Tensor;
typedef struct AOTInductorModelContainerOpaque *Model;

int32_t aoti_torch_device_type_cpu(void);
int32_t aoti_torch_dtype_float32(void);
int32_t aoti_torch_create_tensor_from_blob(void *data, int64_t ndim, const int64_t *sizes, const int64_t *strides,
                                           int64_t offset, int32_t dtype, int32_t device, int32_t index, Tensor *ret);
int32_t aoti_torch_get_data_ptr(Tensor tensor, void **ret);
int32_t aoti_torch_get_dim(Tensor tensor, int64_t *ret);
int32_t aoti_torch_get_dtype(Tensor tensor, int32_t *ret);
int32_t aoti_torch_get_sizes(Tensor tensor, int64_t **ret);
int32_t aoti_torch_is_contiguous(Tensor tensor, bool *ret);
int32_t aoti_torch_delete_tensor_object(Tensor tensor);

/* What the model's library exports. */
static int32_t (*create)(Model *ret, size_t copies, const char *device, const char *kernels);
static int32_t (*count_inputs)(Model model, size_t *ret);
static int32_t (*count_outputs)(Model model, size_t *ret);
static int32_t (*run)(Model model, Tensor *inputs, size_t, Tensor *outputs, size_t, void *stream, void *executor);
static int32_t (*delete)(Model model);

_Noreturn static void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fputs("serve: ", stderr);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(1);
}

/* ---- the package ---- */

static uint64_t little(const uint8_t *p, int bytes)
{
    uint64_t value = 0;
    while (bytes--) value = value << 8 | p[bytes];
    return value;
}

static uint32_t crc32(const uint8_t *p, size_t size)
{
    uint32_t table[256], crc = ~0u;
    for (uint32_t i = 0; i < 256; i++) {
        table[i] = i;
        for (int bit = 0; bit < 8; bit++) table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xEDB88320u : 0);
    }
    while (size--) crc = crc >> 8 ^ table[(crc ^ *p++) & 255];
    return ~crc;
}

typedef struct span {
    const uint8_t *data;
    size_t size;
} span;

/* The bytes of the member that this record of the zip's directory is of. */
static span member(span zip, const uint8_t *record, const char *path)
{
    const uint64_t size = little(record + 24, 4), at = little(record + 42, 4);
    if (size == UINT32_MAX || at == UINT32_MAX) fail("%s: models of more than 4 GiB are not read", path);
    if (little(record + 10, 2) != 0) fail("%s: the model is compressed, which no package of torch is", path);
    if (at + 30 > zip.size) fail("%s is damaged: a member lies outside", path);
    const uint64_t start = at + 30 + little(zip.data + at + 26, 2) + little(zip.data + at + 28, 2);
    if (start + size > zip.size) fail("%s is damaged: a member lies outside", path);
    if (crc32(zip.data + start, size) != little(record + 16, 4)) fail("%s is damaged: its checksum is wrong", path);
    return (span){zip.data + start, size};
}

static bool ends(const char *name, size_t length, const char *end)
{
    const size_t tail = strlen(end);
    return length > tail && memcmp(name + length - tail, end, tail) == 0;
}

/* The members that we read: the model's library, and its metadata. */
static void find(span zip, const char *path, span *model, span *metadata)
{
    size_t end = zip.size < 22 ? 0 : zip.size - 22 + 1; /* the end record is 22 bytes, and a comment may follow */
    while (end-- > 0 && memcmp(zip.data + end, "PK\5\6", 4) != 0)
        ;
    if (end == SIZE_MAX) fail("%s is no package, or not a whole one: a zip's directory is missing", path);
    uint64_t at = little(zip.data + end + 16, 4);
    for (uint64_t left = little(zip.data + end + 10, 2); left--;) {
        const uint8_t *record = zip.data + at;
        if (at + 46 > end || memcmp(record, "PK\1\2", 4) != 0) fail("%s is damaged: its directory is", path);
        const size_t length = little(record + 28, 2);
        const char *name = (const char *)record + 46;
        if (at + 46 + length > end) fail("%s is damaged: its directory is", path);
        if (ends(name, length, ".wrapper.json"))
            fail("%s calls operators that torch's C ABI does not reach, such as losses: it runs from Python", path);
        if (ends(name, length, ".wrapper_metadata.json")) *metadata = member(zip, record, path);
        if (ends(name, length, ".so")) {
            if (model->data) fail("%s holds several models", path);
            *model = member(zip, record, path);
        }
        at += 46 + length + little(record + 30, 2) + little(record + 32, 2);
    }
    if (!model->data) fail("%s holds no compiled model: aoti_compile_and_package writes one", path);
}

static void *symbol(void *from, const char *name, const char *path)
{
    void *found = dlsym(from, name);
    if (!found) fail("%s: the model has no %s", path, name);
    return found;
}

/* The model, and the shape of its images as they were written: 1x8x8. */
static Model load(const char *path, char *shape, size_t size)
{
    struct stat status;
    const int package = open(path, O_RDONLY);
    if (package < 0 || fstat(package, &status)) fail("%s can't be read: %m", path);
    if (status.st_size == 0) fail("%s is empty", path);
    span zip = {.size = (size_t)status.st_size};
    void *mapped = mmap(NULL, zip.size, PROT_READ, MAP_PRIVATE, package, 0);
    if (mapped == MAP_FAILED) fail("%s can't be read: %m", path);
    zip.data = mapped;
    span left = {0}, metadata = {0};
    find(zip, path, &left, &metadata);
    static const char key[] = "\"image\": \"";
    const char *said = metadata.data ? memmem(metadata.data, metadata.size, key, strlen(key)) : NULL;
    if (!said) fail("%s does not say what shape an image has: package it with the metadata of serve.py", path);
    said += strlen(key);
    const char *quote = memchr(said, '"', metadata.size - (size_t)(said - (const char *)metadata.data));
    snprintf(shape, size, "%.*s", quote ? (int)(quote - said) : 0, said);

    /* A file without a name, which ends with the process. */
    char name[32];
    const int file = memfd_create("model.so", 0);
    while (file >= 0 && left.size) {
        const ssize_t written = write(file, left.data, left.size);
        if (written < 0) break;
        left.data += written, left.size -= (size_t)written;
    }
    if (left.size) fail("no memory for the model: %m");
    munmap(mapped, zip.size);
    close(package);

    snprintf(name, sizeof name, "/proc/self/fd/%d", file);
    setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 0); /* or a wrong shape would be read as the right one */
    void *model = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!model) fail("%s does not fit this torch or this processor: %s", path, dlerror());
    *(void **)&create = symbol(model, "AOTInductorModelContainerCreateWithDevice", path);
    *(void **)&count_inputs = symbol(model, "AOTInductorModelContainerGetNumInputs", path);
    *(void **)&count_outputs = symbol(model, "AOTInductorModelContainerGetNumOutputs", path);
    *(void **)&run = symbol(model, "AOTInductorModelContainerRun", path);
    *(void **)&delete = symbol(model, "AOTInductorModelContainerDelete", path);

    Model made;
    size_t inputs, outputs;
    if (create(&made, 1, "cpu", NULL)) fail("%s: torch can't make the model, as it says above", path);
    if (count_inputs(made, &inputs) || count_outputs(made, &outputs) || inputs != 1 || outputs != 1)
        fail("%s: the model must have one input and one output", path);
    return made;
}

/* ---- images in, classes out ---- */

typedef struct shape {
    const char *text;                       /* "1x8x8" */
    int64_t size[MAX_DIM], stride[MAX_DIM]; /* of the batch and that */
    int dim;
} shape;

static shape parse(const char *text)
{
    shape s = {.text = text, .dim = 1};
    char *rest;
    for (const char *p = text; s.dim < MAX_DIM; p = rest + 1) {
        s.size[s.dim] = strtoll(p, &rest, 10);
        if (rest == p || s.size[s.dim] < 1 || s.size[s.dim] > 1 << 20) break;
        s.dim++;
        if (*rest == 'x') continue;
        if (*rest) break;
        int64_t numel = 1;
        for (int i = s.dim; i-- > 0; numel *= s.size[i]) {
            s.stride[i] = numel;
            if (numel > 1 << 28) fail("images of %s are too large", text);
        }
        return s;
    }
    fail("the shape of an image is written as 3x32x32, not '%s'", text);
}

/* Prints the answers for the first `count` images. */
static void answer(Model model, float *images, shape s, int64_t count, int64_t before)
{
    Tensor input, output;
    void *data;
    int64_t dim, *size;
    int32_t dtype;
    bool contiguous;
    s.size[0] = count;
    if (aoti_torch_create_tensor_from_blob(images, s.dim, s.size, s.stride, 0, aoti_torch_dtype_float32(),
                                           aoti_torch_device_type_cpu(), 0, &input))
        fail("torch makes no tensor of the images");
    if (run(model, &input, 1, &output, 1, NULL, NULL)) /* the input is the model's now */
        fail("the model does not run on images of %s; torch says above why", s.text);
    if (aoti_torch_get_dim(output, &dim) || aoti_torch_get_sizes(output, &size) ||
        aoti_torch_get_dtype(output, &dtype) || aoti_torch_is_contiguous(output, &contiguous) ||
        aoti_torch_get_data_ptr(output, &data) || dim != 2 || size[0] != count || !contiguous ||
        dtype != aoti_torch_dtype_float32())
        fail("the model must give a row of float32 logits for each image");
    for (int64_t i = 0; i < count; i++) {
        const float *logit = (const float *)data + i * size[1];
        int64_t best = 0;
        double sum = 0;
        for (int64_t c = 1; c < size[1]; c++)
            if (logit[c] > logit[best]) best = c;
        for (int64_t c = 0; c < size[1]; c++) sum += exp((double)logit[c] - logit[best]);
        if (!isfinite(sum)) fail("the logits of image %lld are not finite", (long long)(before + i));
        printf("%lld %.6f\n", (long long)best, 1 / sum);
    }
    aoti_torch_delete_tensor_object(output);
    fflush(stdout);
}

int main(int count, char **args)
{
    if (count != 2) fail("usage: %s package.pt2 < images", args[0]);
    char text[64];
    Model model = load(args[1], text, sizeof text);
    const shape s = parse(text);
    const size_t bytes = (size_t)s.stride[0] * sizeof(float);
    float *images = malloc(BATCH * bytes);
    if (!images) fail("no memory for %d images of %s", BATCH, s.text);
    int64_t done = 0;
    for (size_t got = BATCH * bytes; got == BATCH * bytes; done += BATCH) {
        got = fread(images, 1, BATCH * bytes, stdin);
        if (ferror(stdin)) fail("images can't be read: %m");
        if (got >= bytes) answer(model, images, s, (int64_t)(got / bytes), done);
        if (got % bytes)
            fail("the last image, of %s, is not whole: it has %zu bytes of %zu", s.text, got % bytes, bytes);
    }
    free(images);
    delete (model);
    return 0;
}
